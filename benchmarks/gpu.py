"""Everything that is to be known of an accelerator, in one call of nine minutes.

    python benchmarks/gpu.py                                    # on a GPU
    python benchmarks/gpu.py --stages=decode,training --resume  # those, as far as left
    python benchmarks/gpu.py --rehearse                         # toy sizes, on a CPU

Stages run in the order of their worth, each part of one in a process of its own with a
time limit. What is found is appended at once to rows.jsonl in --out, and the tables of
gpu.json are written anew after each part: whatever is killed, fails or runs out of
memory leaves a row that says so, and the others go on. With --resume, what is done is
not done again. `gpu.md` beside this file says what to carry to a machine without a
network; the stages themselves are in `gpu_stages.py`.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_stages  # noqa: E402

from vaani_jax.files import to_json, write_atomically  # noqa: E402

ROWS = "rows.jsonl"
LEAST = 20.0  # seconds that a part is started with
LAST_LINES = 3  # of what failed
COMPILING = 0.4  # of the time that is left, at most


class Rows:
    """What was found so far: a line of JSON each, appended and never rewritten."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._path = folder / ROWS

    def all(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut off by a kill
        return found

    def done(self, stage: str, part: str) -> bool:
        """Whether a part has ended without an error."""
        return any(
            row["stage"] == stage and row.get("part") == part and row.get("ended")
            for row in self.all()
        )

    def add(self, row: dict[str, Any]) -> None:
        text = json.dumps(row) + "\n"
        before = self._path.read_bytes() if self._path.exists() else b"\n"
        whole = before.endswith(b"\n")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text if whole else "\n" + text)

    def assemble(self, command: str, rehearsal: bool) -> None:
        """Writes gpu.json: the latest row of each name, as tables of `docs/`."""
        tables: dict[str, Any] = {}
        machine = "not known"
        for name, columns in gpu_stages.TABLES.items():
            found = {
                row["name"]: row
                for row in self.all()
                if row.get("table", row["stage"]) == name and "name" in row
            }
            if not found:
                continue
            if name == "machine":
                machine = str(found.get("chip", {}).get("value", machine))
            used = [c for c in columns if any(c in row for row in found.values())]
            lines = [
                [key, *(_cell(row.get(column)) for column in used)]
                for key, row in found.items()
            ]
            tables[name] = {"columns": ["", *used], "rows": lines}
        about = "a rehearsal at toy sizes, of no meaning" if rehearsal else "one device"
        content = {
            "about": f"{about}; {__doc__.splitlines()[0].lower()}",
            "command": command,
            "machine": machine,
            "date": datetime.date.today().isoformat(),
            "tables": tables,
        }
        text = to_json(content, indent=1) + "\n"
        write_atomically(self._folder / "gpu.json", text.encode())


def _cell(value: Any) -> Any:
    if value is None:
        return "-"
    return float(f"{value:.4g}") if isinstance(value, float) else value


def start_part(
    options: argparse.Namespace,
    stage: str,
    part: str,
    limit: float,
    output: Any,
    *,
    compile_only: bool = False,
) -> subprocess.Popen[bytes]:
    """A process of its own, in a session of its own; ``output`` takes its errors."""
    command = [sys.executable, str(pathlib.Path(gpu_stages.__file__).resolve())]
    command += [stage, part, str(options.out), str(limit)]
    if options.rehearse:
        command.append("--rehearse")
    if options.data:
        command.append(f"--data={options.data}")
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(options.out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
    }
    if options.rehearse:
        environment["JAX_PLATFORMS"] = "cpu"
    if compile_only:
        command.append("--compile")
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return subprocess.Popen(
        command, stderr=output, start_new_session=True, env=environment
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends it, with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compile_parts(
    options: argparse.Namespace, parts: list[tuple[str, str]], limit: float
) -> None:
    """Fills the compilation cache, several parts side by side.

    Compiling takes longer than measuring, and most of it one processor.
    """
    most = max(2, (os.cpu_count() or 2) // 3)
    print(f"compiling {len(parts)} parts, {most} at a time ({limit:.0f} s at most)")
    waiting = list(parts)
    running: dict[subprocess.Popen[bytes], str] = {}
    start = time.monotonic()
    with open(options.out / "compile.log", "ab") as output:
        try:
            while (waiting or running) and time.monotonic() - start < limit:
                while waiting and len(running) < most:
                    stage, part = waiting.pop(0)
                    process = start_part(
                        options, stage, part, limit, output, compile_only=True
                    )
                    running[process] = f"{stage}, {part}"
                time.sleep(0.2)
                for process in [p for p in running if p.poll() is not None]:
                    name, spent = running.pop(process), time.monotonic() - start
                    failed = f", status {process.returncode}"
                    result = failed if process.returncode else ""
                    print(f"  {name}: {spent:.0f} s{result}", flush=True)
        finally:
            for process in running:
                end(process)


def run_part(options: argparse.Namespace, stage: str, part: str, limit: float) -> None:
    """One process; what it doesn't say itself is said for it."""
    log = options.out / f"{stage}.log"
    start = time.monotonic()
    rows = Rows(options.out)
    with open(log, "ab") as output:
        begin = output.tell()
        process = start_part(options, stage, part, limit, output)
        status = None
        try:
            status = process.wait(limit)
            reason = f"killed by signal {-status}" if status < 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            reason = f"took more than {limit:.0f} s"
        finally:
            end(process)
    seconds = round(time.monotonic() - start, 1)
    if status == 0:
        rows.add({"stage": stage, "part": part, "ended": True, "seconds": seconds})
        return
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.strip()[:300] for line in lines if line.strip()]
    note = reason if status is None else gpu_stages.reason_of(lines) or reason
    print(f"  {part}: {note}", flush=True)
    rows.add(
        {
            "stage": stage,
            "part": part,
            "name": part,
            "note": note,
            "lines": lines[-LAST_LINES:],
            "seconds": seconds,
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    names = list(gpu_stages.STAGES)
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; 9")
    parser.add_argument(
        "--stages", default=",".join(names), help=f"of {', '.join(names)}; all"
    )
    parser.add_argument(
        "--only", default="", help="parts whose names hold one of these, cut at ;"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu"))
    parser.add_argument("--resume", action="store_true", help="only what is not done")
    parser.add_argument(
        "--rehearse", "--toy", action="store_true", help="toy sizes, on a CPU"
    )
    parser.add_argument("--data", help="text of the training runs; generated if none")
    options = parser.parse_args()
    wanted = [name for name in options.stages.split(",") if name]
    for name in wanted:
        if name not in gpu_stages.STAGES:
            parser.error(f"no stage {name}: there are {', '.join(names)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out)
    if not options.resume and (options.out / ROWS).exists():
        kept = options.out / f"rows-{int(time.time())}.jsonl"
        (options.out / ROWS).rename(kept)
        print(f"earlier rows are in {kept.name} now; --resume goes on with them")
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    print(f"Python {platform.python_version()}; results in {options.out}", flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    parts = [
        (name, part)
        for name in wanted
        for part in getattr(
            gpu_stages.STAGES[name], "toys" if options.rehearse else "parts"
        )
        if not (options.resume and rows.done(name, part))
        and (not options.only or any(t in part for t in options.only.split(";")))
    ]
    compiled = False
    try:
        for name, part in parts:
            stage = gpu_stages.STAGES[name]
            left = deadline - time.monotonic()
            if stage.compiles and not compiled:
                compiled = True
                slow = [p for p in parts if gpu_stages.STAGES[p[0]].compiles]
                compile_parts(options, slow, left * COMPILING)
                left = deadline - time.monotonic()
            if left < LEAST:
                print(f"{name}, {part}: no time left", flush=True)
                continue
            limit = min(stage.seconds, left)
            print(f"{name}, {part} ({limit:.0f} s at most)", flush=True)
            run_part(options, name, part, limit)
            rows.assemble(command, options.rehearse)
    except KeyboardInterrupt:
        print("interrupted: what was found so far is kept", file=sys.stderr)
        return 130
    finally:
        rows.assemble(command, options.rehearse)
    print(f"{options.out / 'gpu.json'} has the tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
