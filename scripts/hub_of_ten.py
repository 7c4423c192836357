"""A class on a JupyterHub of its own on this machine: all students run a notebook, with its exercises, at once.

First each in their own kernel, then against one server for all; what it took is printed as a table. As root, after
`make hub`:

    python -m scripts.hub_of_ten [05] [--students 10] [--memory 1024] [--only embedded|remote] [--short]
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from scripts.hub import MIB, SCOPE, Hub, KernelLine, MemoryGroups, until
from tensafe_nb.classroom.grading import asked_in, notebook_of, solutions_of

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ADAPTER = """
import tensafe_nb as tn
service = tn.ServiceClient()
tc = service.create_training_client(model_ref="builtin:tiny", lora_config=tn.LoRAConfig(rank=8))
tc.forward_backward({"input_ids": [[5, 6, 7, 8]]}).result()
"""
How = Literal["embedded", "remote"]


@dataclass
class Student:
    """What one student saw.

    Attributes:
        name: In the hub.
        seconds: What each notebook took, from its first cell to its last.
        right: How many exercises were found right, of all.
        peak: The most bytes that server and kernel took together, as the kernel of the system counts them.
        killed: How many of its processes were killed for memory.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    right: int = 0
    peak: int = 0
    killed: int = 0


@dataclass
class Lesson:
    """What a class took.

    Attributes:
        how: Where the models were.
        students: What each saw.
        exercises: How many there were for each.
        together: The most bytes (PSS) that the students' processes and the training server took together.
        server: The training server's part of that.
        bases: Models whose frozen weights the server held when each student had an adapter on the same one.
        references: How many students shared them.
        load: The machine's load when it began, and when it ended.
    """

    how: How
    students: list[Student]
    exercises: int = 0
    together: int = 0
    server: int = 0
    bases: int | None = None
    references: int | None = None
    load: tuple[float, float] = (0.0, 0.0)

    @property
    def slowest(self) -> float:
        """The seconds that all notebooks took the slowest student."""
        return max(sum(student.seconds.values()) for student in self.students)

    @property
    def median(self) -> float:
        """The seconds that they took the student in the middle."""
        return statistics.median(sum(student.seconds.values()) for student in self.students)


def cells_of(path: Path) -> list[str]:
    """Return the code of a notebook, its exercises answered as a student would who has understood them."""
    solutions = solutions_of(path.parent / "solutions" / f"{path.stem}.py")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [
        f'{solutions[number]}\n\ntn.check("{number}", answer)'
        if (number := asked_in(cell))
        else "".join(cell["source"])
        for cell in cells
    ]


def work_through(hub: Hub, student: Student, paths: Sequence[Path]) -> None:
    """Open one notebook after the other, and run all its cells; each kernel is shut down before the next begins."""
    for path in paths:
        with hub.kernel(student.name) as line:
            started = time.monotonic()
            said = [line.run(cell, seconds=3600) for cell in cells_of(path)]
            student.seconds[path.stem] = time.monotonic() - started
        student.right += sum(bool(re.search(r"✓ \d\d\.\d right", words)) for words in said)


@contextmanager
def watched(hub: Hub, groups: MemoryGroups, lesson: Lesson) -> Iterator[None]:
    """Look every other second how much memory all of it takes."""
    over = threading.Event()
    servers = children_of(hub.process.pid, "serve") if lesson.how == "remote" else []

    def watch() -> None:
        while not over.wait(2):
            of_server = sum(pss_of(pid) for pid in servers)
            of_students = sum(pss_of(pid) for name in groups.names for pid in groups.processes(name))
            if of_server + of_students > lesson.together:
                lesson.together, lesson.server = of_server + of_students, of_server

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def pss_of(pid: int) -> int:
    """Return a process's proportional memory in bytes: a page that several share counts in parts. 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except (psutil.Error, OSError):
        return 0


def children_of(pid: int, word: str) -> list[int]:
    """Return the processes below one whose command has a word."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if word in child.cmdline():
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def hold_adapters(hub: Hub, lesson: Lesson) -> None:
    """Let every student have an adapter on the same model at the same time; note what the server holds."""
    with ExitStack() as open_kernels:
        lines: list[KernelLine] = [
            open_kernels.enter_context(hub.kernel(each.name)) for each in lesson.students
        ]
        with ThreadPoolExecutor(len(lines)) as pool:
            list(pool.map(lambda line: line.run(ADAPTER, seconds=600), lines))
        token = hub.token_of(lesson.students[0].name, [SCOPE])
        figures = httpx.get(
            f"{hub.service}/metrics", headers={"authorization": f"Bearer {token}"}, timeout=60
        ).text
        found: dict[str, Any] = dict(re.findall(r"^tensafe_nb_(base_\w+) (\d+)$", figures, re.MULTILINE))
        lesson.bases, lesson.references = int(found["base_models"]), int(found["base_references"])


def teach(how: How, numbers: Sequence[str], students: int, limit: int, *, short: bool = False) -> Lesson:
    """Start a hub, let a class work on it, and say what it took.

    Args:
        how: Whether models are in the students' kernels, or in one server.
        numbers: Of the notebooks, such as "05".
        students: How many.
        limit: Bytes of memory for each.
        short: Whether notebooks take few steps.
    """
    paths = [notebook_of(number, NOTEBOOKS) for number in numbers]
    lesson = Lesson(how, [Student(f"student-{number:02d}") for number in range(1, students + 1)])
    lesson.exercises = sum(cell.count("\ntn.check(") for path in paths for cell in cells_of(path))
    names = [student.name for student in lesson.students]
    groups = MemoryGroups(names, limit)
    began = os.getloadavg()[0]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="tensafe-hub-") as folder,
            Hub(Path(folder), groups=groups, remote=how == "remote", short=short) as hub,
        ):
            try:
                for name in names:
                    hub.ask("POST", f"/users/{name}")
                    hub.start(name)
                with watched(hub, groups, lesson), ThreadPoolExecutor(students) as pool:
                    list(pool.map(lambda student: work_through(hub, student, paths), lesson.students))
                if how == "remote":
                    hold_adapters(hub, lesson)
            except BaseException:
                print(hub.log)
                raise
            finally:
                for student in lesson.students:
                    student.peak, student.killed = groups.peak(student.name), groups.killed(student.name)
                for name in names:
                    hub.stop(name)
                until(lambda: not any(groups.processes(name) for name in names))
    finally:
        groups.remove()
    lesson.load = (began, os.getloadavg()[0])
    return lesson


def row(lesson: Lesson) -> str:
    """Return a lesson as a row of the table."""
    peaks = [student.peak / MIB for student in lesson.students]
    cells = [
        f"{len(lesson.students)}, {lesson.how}",
        str(sum(student.killed for student in lesson.students)),
        f"{sum(student.right for student in lesson.students)} of {lesson.exercises * len(lesson.students)}",
        f"{lesson.median:.0f} s",
        f"{lesson.slowest:.0f} s ({lesson.slowest / lesson.median:.2f} ×)",
        f"{statistics.median(peaks):.0f}, {max(peaks):.0f} MiB",
        f"{lesson.together / MIB:,.0f} MiB",
        f"{lesson.server / MIB:,.0f} MiB",
        f"{lesson.load[0]:.1f} → {lesson.load[1]:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "students",
    "killed",
    "exercises right",
    "time, median",
    "slowest",
    "memory of one at its peak: median, most",
    "of all together (PSS)",
    "of which the server",
    "load of the machine",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", default=["05"], help="of the notebooks (default: 05)")
    parser.add_argument("--students", type=int, default=10)
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="of each student")
    parser.add_argument("--only", choices=("embedded", "remote"))
    parser.add_argument(
        "--short", action="store_true", help="let notebooks take few steps, where the machine is busy"
    )
    chosen = parser.parse_args()
    print(
        f"notebooks {', '.join(chosen.numbers)}; {chosen.memory} MiB for each student\n\n{HEAD}", flush=True
    )
    hows: tuple[How, ...] = (chosen.only,) if chosen.only else ("embedded", "remote")
    for how in hows:
        lesson = teach(how, chosen.numbers, chosen.students, chosen.memory * MIB, short=chosen.short)
        print(row(lesson), flush=True)
        if lesson.bases is not None:
            print(f"\nan adapter for each on one model: {lesson.bases} read, shared by {lesson.references}")


if __name__ == "__main__":
    main()
