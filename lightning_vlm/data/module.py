"""The one DataModule: training mixture, named evaluations, prediction prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from math import gcd
from typing import Literal, Protocol

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.images import load_image
from lightning_vlm.data.loading import DueLoader, EncodedDataset, RankShard, StepBatch, StepSampler, join
from lightning_vlm.data.mixture import Mixture
from lightning_vlm.data.probe import encode_probe
from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.models.batch import Row
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

_SECOND_WALK = 1_000_000_007  # added to the seed

Encoding = Literal["conversation", "pair", "answer", "prompt", "probe"]


class Evaluation(Protocol):
    """What a callback registers: a named set of samples with its own interval, and the metrics it will log."""

    name: str
    samples: Sequence[Sample]
    every: int
    encoding: Encoding
    metric_names: Collection[str]


class VLMData(L.LightningDataModule):
    """Samples of any sources, encoded in workers, one batch per optimizer step.

    Evaluations are registered by callbacks (`callbacks.Geometry3K: {path: …, every: 200}`); each becomes a named
    validation loader that yields nothing while it is not due.

    Args:
        backbone: the model whose processor encodes the samples (linked from the top-level `backbone`).
        train: named sources to train on, mixed by their `weight`.
        predict: named sources whose prompts `lightning-vlm predict` answers.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        eval_batch_size: prompts generated together on one rank in evaluation and prediction.
        workers: processes that decode images and encode samples; 0 does it in the main process.
        max_length: longest sequence in tokens, image tokens included; longer samples are bad samples.
        on_bad_sample: `error` stops at the first sample that cannot be used; `skip` leaves it out and reports it.
        shuffle: walk the training data in a seeded permutation per epoch; False keeps its order.
        seed: seed of permutations and mixtures.

    Raises:
        ValueError: no data for what is asked, or a setting of the Trainer that this module replaces.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        train: dict[str, SourceSpec] | None = None,
        predict: dict[str, SourceSpec] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        workers: int = 2,
        max_length: int = 4096,
        on_bad_sample: Literal["error", "skip"] = "error",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
            ("max_length", max_length, 1),
        ):
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        self.backbone, self.train_specs, self.predict_specs = backbone, train or {}, predict or {}
        self.batch_size, self.eval_batch_size, self.workers = batch_size, eval_batch_size, workers
        self.max_length, self.on_bad_sample, self.shuffle, self.seed = max_length, on_bad_sample, shuffle, seed
        self.evaluations: dict[str, Evaluation] = {}
        self.processor = None
        self.train_samples: Sequence[Sample] | None = None

    def setup(self, stage: str) -> None:
        """Load the processor and open the sources that `stage` needs."""
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "set trainer.use_distributed_sampler: false; the data module shards each step's samples itself"
            )
        if self.processor is None:
            self.processor = load_processor(self.backbone)
            self.encoder = Encoder(self.processor, max_length=self.max_length)
        if stage == "fit" and self.train_samples is None:
            if not self.train_specs:
                raise ValueError("nothing to train on: give data.train at least one named source")
            sources = open_named("data.train", self.train_specs, for_training=True)
            weights = [spec.weight for spec in self.train_specs.values()]
            self.train_samples = Mixture(sources, weights, seed=self.seed)
            self._bound_by_steps()

    def _bound_by_steps(self) -> None:
        """Turn `max_epochs` into `max_steps`: the loader has no epochs, the clock counts optimizer steps."""
        fit_loop = self.trainer.fit_loop
        if fit_loop.max_steps == -1 and fit_loop.max_epochs not in (None, -1):
            module = self.trainer.lightning_module
            # Steps with samples of their own, each of which may feed several.
            per_epoch = -(-len(self.train_samples) // self.batch_size)
            steps = fit_loop.max_epochs * per_epoch * (module.steps_per_batch // module.steps_loaded)
            fit_loop.epoch_loop.max_steps = steps
        fit_loop.max_epochs = -1

    def register(self, evaluation: Evaluation) -> None:
        """Add a named evaluation; its loader yields only at multiples of `evaluation.every` optimizer steps.

        Raises:
            ValueError: two evaluations of one name, an interval below 1, or `trainer.val_check_interval` set by hand.
        """
        if evaluation.name in self.evaluations and self.evaluations[evaluation.name] is not evaluation:
            raise ValueError(f"two evaluations are named {evaluation.name!r}; give one of them another `name`")
        if evaluation.every < 1:
            raise ValueError(f"evaluation {evaluation.name!r} has every={evaluation.every}; it must be at least 1")
        if len(evaluation.samples) == 0:
            raise ValueError(f"evaluation {evaluation.name!r} has no samples")
        self.evaluations[evaluation.name] = evaluation
        trainer = self.trainer
        # Lightning asks for validation every so many batches; the loaders decide who is due. The last step counts too.
        total = trainer.max_steps if trainer.max_steps > 0 else 0
        intervals = [e.every for e in self.evaluations.values()] + ([total] if total else [])
        # A batch that feeds several steps may cross any of them: then every batch is asked about.
        several = trainer.lightning_module.steps_per_batch > 1
        trainer.val_check_interval = 1 if several else gcd(*intervals)
        trainer.check_val_every_n_epoch = None

    def due(self, evaluation: Evaluation) -> bool:
        """Whether a multiple of the evaluation's interval was crossed since it last ran, or the run ends here."""
        module = self.trainer.lightning_module
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return True
        return module.evaluation_due(evaluation)

    def train_dataloader(self) -> DataLoader:
        """Batches without end; a restored run goes on with the batch that comes next."""
        sampler = self._train_sampler()
        dataset = EncodedDataset(self.train_samples, self._encode_training())
        return self._loader(dataset, sampler, collate=partial(join, per_step=sampler.per_step))

    def upcoming(self) -> DataLoader:
        """What the run draws from its start to its end, each text once, shared out among ranks: for a pass beforehand.

        The same after a restart, so that what is computed in batches of it is the same to the last bit.
        """
        module, steps = self.trainer.lightning_module, max(0, self.trainer.fit_loop.epoch_loop.max_steps)
        places: dict[tuple[int, ...], int] = {}
        for batch in islice(iter(self._train_sampler(whole=True)), -(-steps // module.steps_per_batch)):
            for index in batch:
                source, element, walk = self.train_samples.locate(index)
                varies = getattr(self.train_samples.sources[source], "varies", False)
                places.setdefault((source, element, walk) if varies else (source, element), index)
        indices, size = list(places.values())[self._rank :: self._world], self.eval_batch_size
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        dataset = EncodedDataset(self.train_samples, self._encode_training())
        return self._loader(dataset, batches, persistent=False)

    def _train_sampler(self, whole: bool = False, second: int | None = None) -> StepSampler:
        """Of this rank, from where the run stands.

        Args:
            whole: of all ranks, from the start of the run. second: of a second walk in another order, from this batch.
        """
        module = self.trainer.lightning_module
        return StepSampler(
            len(self.train_samples),
            self.batch_size,
            seed=self.seed if second is None else self.seed + _SECOND_WALK,
            rank=0 if whole else self._rank,
            world=1 if whole else self._world,
            steps=module.steps_loaded,
            shuffle=self.shuffle or second is not None,
            start=lambda: 0 if whole else module.batches_done if second is None else second,
        )

    def more_prompts(self, index: int) -> StepBatch:
        """Batch `index` of a second walk through the training samples, in another order: where the first one's batch
        was not enough. Encoded in this process.

        Raises:
            BadSample: a sample cannot be used.
        """
        module = self.trainer.lightning_module
        sampler = self._train_sampler(second=index)
        dataset = EncodedDataset(self.train_samples, self._encode_training())
        batch = join([dataset[place] for place in next(iter(sampler))], sampler.per_step)
        return self.transfer_batch_to_device(batch, module.device, 0)

    def val_dataloader(self) -> list[DueLoader]:
        """One loader per registered evaluation, in registration order."""
        if not self.evaluations and self.trainer.state.fn != "fit":
            raise ValueError("nothing to evaluate: name benchmarks under `callbacks`, such as -c callbacks/world")
        return [DueLoader(self._eval_loader(e), lambda e=e: self.due(e)) for e in self.evaluations.values()]

    def test_dataloader(self) -> list[DueLoader]:
        """The same evaluations, all due."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Prompts of `data.predict` in order."""
        if not self.predict_specs:
            raise ValueError("nothing to predict on: give data.predict at least one named source")
        samples = Mixture(open_named("data.predict", self.predict_specs, for_training=False), None)
        return self._prompt_loader(samples, "prompt")

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Batches stay on the host; micro-batches travel to the device one at a time.

        Raises:
            BadSample: a sample cannot be used; here, because an error in a worker would arrive as another one.
        """
        if batch.skipped and not (self.trainer.training and self.on_bad_sample == "skip"):
            remedy = "mend the data, or set data.on_bad_sample: skip to leave out such samples"
            if not self.trainer.training:  # a benchmark with an item left out is another benchmark
                remedy = "mend the data, or take the sample out: evaluation and prediction leave out nothing"
            id, reason, detail = batch.skipped[0]
            raise BadSample(id, reason, f"{detail} ({remedy})")
        return batch

    def _encode(self, encoding: Encoding) -> Callable[[Sample], list[Row]]:
        encoder = self.encoder
        return {
            "conversation": _One(encoder.encode),
            "prompt": _One(encoder.encode_prompt),
            "pair": encoder.encode_pair,
            "answer": encoder.encode_answer,
            "probe": partial(encode_probe, encoder),
        }[encoding]

    def _encode_training(self) -> Callable[[Sample], list[Row]]:
        """As the algorithm wants it; with what other models, or an engine elsewhere, must see of a sample."""
        module = self.trainer.lightning_module
        encode = self._encode(module.encoding)
        if not module.other_processors and not module.needs_pictures:
            return encode
        others = [Encoder(processor, max_length=self.max_length) for processor in module.other_processors]
        return _WithOthers(encode, others, module.needs_pictures)

    def _eval_loader(self, evaluation: Evaluation) -> DataLoader:
        return self._prompt_loader(evaluation.samples, evaluation.encoding)

    def _prompt_loader(self, samples: Sequence[Sample], encoding: Encoding) -> DataLoader:
        sampler = RankShard(len(samples), self.eval_batch_size, rank=self._rank, world=self._world)
        return self._loader(EncodedDataset(samples, self._encode(encoding)), sampler, persistent=False)

    def _loader(self, dataset, sampler, persistent: bool = True, collate: Callable = join) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=persistent and self.workers > 0,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank

    @property
    def _world(self) -> int:
        return self.trainer.world_size


def open_named(key: str, specs: dict[str, SourceSpec], *, for_training: bool) -> list[Sequence[Sample]]:
    """Open named sources; a source without a label of its own takes its name, so that ids do not collide.

    Args:
        key: where the sources stand in the configuration, to begin errors with.
        specs: name → what to open. for_training: whether something learns from them.
    """
    sources = []
    for name, spec in specs.items():
        try:
            sources.append(open_source(replace(spec, label=spec.label or name), for_training=for_training))
        except ValueError as err:
            raise ValueError(f"{key}.{name}: {err}") from err
    return sources


class _One:
    """A single row as an item; a class so that workers started by spawn can unpickle it."""

    def __init__(self, encode: Callable[[Sample], Row]) -> None:
        self.encode = encode

    def __call__(self, sample: Sample) -> list[Row]:
        return [self.encode(sample)]


class _WithOthers:
    """The rows of a sample, behind them its prompt as other models see it.

    Args:
        encode: Sample → rows. others: encoders of the other models.
        pictures: put the sample's `pictures` into the first row's info, for an engine outside of this process.
    """

    def __init__(self, encode: Callable[[Sample], list[Row]], others: list[Encoder], pictures: bool) -> None:
        self.encode, self.others, self.pictures = encode, others, pictures

    def __call__(self, sample: Sample) -> list[Row]:
        rows = [*self.encode(sample), *(encoder.encode_prompt(sample) for encoder in self.others)]
        if self.pictures:
            rows[0].info["pictures"] = [load_image(source) for source in sample.images]
        return rows
