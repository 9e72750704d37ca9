"""The main job on the embedded default: `make demo`.

A small study on the embedded world, configs/study/demo.yaml: a VLM with random weights learns to see and to answer;
then RL starts from it directly, from over-trained SFT, or from on-policy distillation, two seeds each; a report
compares them. It is one `lightning-vlm` command, printed before it runs; cut off at any moment, it goes on where it
stood.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import webbrowser
from pathlib import Path


def main() -> int:
    """Run the study, open its report where there is a screen; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="where it all goes (default runs/demo)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="stages at once, a core each")
    args, more = parser.parse_known_args()
    words = ["study", "run", "study/demo", "--run_dir", str(args.run_dir), "--jobs", str(args.jobs), *more]
    print(f"$ lightning-vlm {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "lightning_vlm.cli.main", *words]).returncode
    if code:
        return code
    report = (args.run_dir / "report" / "report.html").resolve()
    print("\nmodel directories  " + str(args.run_dir / "*" / "model"))
    print("curves, lineage    mlflow ui --backend-store-uri sqlite:///mlflow.db")
    print(f"report             {report}")
    if os.environ.get("DISPLAY") and sys.stdout.isatty():
        webbrowser.open(report.as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
