"""python -m bench OP: judge the op's correctness, time it beside its rivals, print a table, keep the rows."""

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
ONE_THREAD = ("network", "nufft", "sense")  # rivals use threads differently; scaling is timed apart


def main() -> int:
    ops = sorted(p.stem for p in HERE.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("op", choices=ops)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads for everybody; default: all, for nufft and sense 1")
    parser.add_argument("--no-record", action="store_true", help="leave bench/results/ as it is")
    args = parser.parse_args()
    args.threads = args.threads or (1 if args.op in ONE_THREAD else os.cpu_count())

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads are not charged as work
    import torch

    from bench import _common

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")

    load = f"load {os.getloadavg()[0]:.1f}"
    print(_common.machine(device), _common.versions(args.op), f"commit {_common.commit()}", load, sep=" | ")
    module = importlib.import_module(f"bench.{args.op}")
    try:
        rows = module.run(quick=args.quick, device=device)
    except _common.Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    print(_common.table(rows))
    if hasattr(module, "summary"):
        print(module.summary(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not args.no_record:
        _common.record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
