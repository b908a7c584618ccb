"""Attacks on the sandbox: none succeeds, and none leaves a process or a file."""

# An attack is a line.
# ruff: noqa: E501

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from tts_search.domains.code import Level, Limits, ProgramJudge, Sandbox, SandboxError
from tts_search.domains.code import sandbox as sandbox_module
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, Program

SMALL = Limits(cpu_s=1, wall_s=1.0, memory=192 << 20, output=1 << 16, answer=1 << 16)
CHECKOUT = Path(__file__).resolve()


@pytest.fixture(scope="module", autouse=True)
def _full_level():
    if Sandbox().level() < Level.FULL:
        pytest.skip("this system has no sandbox of the full level")


def attempt(body: str, sandbox: Sandbox | None = None):
    """The outcome of a function of this body."""
    source = "import ctypes, os, signal, socket, sys, threading, time\ndef attack():\n" + textwrap.indent(body, "    ")
    with (sandbox or Sandbox(SMALL)).open() as session:
        loaded = session.load(source)
        return session.call("attack") if loaded.is_value else loaded


def children() -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                found.add(int(name))
    return found


def names() -> set[str]:
    folders = ("/tmp", "/var/tmp", "/dev/shm", "/", os.getcwd(), CHECKOUT.parent)
    return {str(path) for folder in folders for path in Path(folder).glob("attack*")}


@pytest.mark.parametrize(
    ("body", "ends_in"),
    [
        # Bombs. They stand under limits of their own, and the first call of each is refused.
        ("while True:\n    os.fork()", "PermissionError"),
        ("os.posix_spawn('/bin/true', ['true'], {})", "Error"),
        ("os.system('true')\nreturn os.popen('id').read()", "Error"),
        ("while True:\n    threading.Thread(target=time.sleep, args=(9,)).start()", "RuntimeError"),
        ("return len(bytearray(10**10))", "MemoryError"),
        ("found = []\nwhile True:\n    found.append(bytearray(10**6))", "MemoryError"),
        ("while True:\n    print('x' * 1000)", "output"),
        ("return 'x' * 10**6", "output"),
        ("while True:\n    pass", "timeout"),
        ("time.sleep(60)", "timeout"),
        ("found = []\nfor i in range(200):\n    found.append(open(f'{i}', 'w'))", "OSError"),
        (
            "with open('large', 'wb') as file:\n    while True:\n        file.write(bytes(10**6)); file.flush()",
            "OSError",
        ),
        ("value = []\nfor i in range(10**5):\n    value = [value]\nreturn value", "NotPlainError"),
        # Files.
        ("return open('/etc/passwd').read()", "PermissionError"),
        ("return open('/proc/self/environ').read()", "PermissionError"),
        ("return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)", "PermissionError"),
        ("os.symlink('/etc/passwd', 'link')\nreturn open('link').read()", "PermissionError"),
        ("os.mkdir('a')\nos.chdir('a')\nreturn open('../../etc/passwd').read()", "PermissionError"),
        ("open('/var/tmp/attack', 'w')", "PermissionError"),
        ("open('/dev/shm/attack', 'w')", "PermissionError"),
        (f"open({str(CHECKOUT.parent / 'attack')!r}, 'w')", "Error"),
        ("open('/proc/self/oom_score_adj', 'w').write('0')", "PermissionError"),
        ("os.execv('/bin/true', ['true'])", "PermissionError"),
        ("os.chroot('/')", "PermissionError"),
        # The network.
        ("socket.create_connection(('127.0.0.1', 80), 1)", "PermissionError"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", "PermissionError"),
        ("socket.socket(socket.AF_UNIX)", "PermissionError"),
        # Other processes.
        ("os.kill(os.getppid(), signal.SIGKILL)", "PermissionError"),
        ("os.kill(-1, signal.SIGKILL)", "PermissionError"),
        ("os.killpg(os.getpgid(0), signal.SIGKILL)", "PermissionError"),
        ("import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))", "ValueError"),
        ("os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "PermissionError"),
        ("import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("os.setsid()", "PermissionError"),
        # The end of the process.
        ("sys.exit(0)", "SystemExit"),
        ("os._exit(0)", "died"),
        ("os.abort()", "died"),
        ("ctypes.string_at(0)", "died"),
        ("sys.setrecursionlimit(10**6)\ndef f(n):\n    return f(n + 1)\nf(0)", ""),
    ],
)
def test_attack(body, ends_in):
    before = children()
    outcome = attempt(body)
    assert not outcome.is_value, outcome
    assert ends_in in f"{outcome.kind} {outcome.text}"
    assert children() == before
    assert not names()


@pytest.mark.parametrize(
    "body", [f"return open({str(CHECKOUT)!r}).read()", f"return os.listdir({str(CHECKOUT.parent)!r})"]
)
def test_the_checkout_cannot_be_read(body):
    outcome = attempt(body)
    assert outcome.kind == "raised", outcome
    # One below /tmp is not there at all: the sandbox has a /tmp of its own.
    assert outcome.text.startswith(("PermissionError", "FileNotFoundError")), outcome


def test_ptrace_is_refused():
    body = "libc = ctypes.CDLL(None, use_errno=True)\nreturn libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno()"
    assert attempt(body).value == (-1, 1)


def test_signals_cannot_stretch_the_time():
    body = "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsignal.signal(signal.SIGALRM, lambda *a: None)\nwhile True:\n    pass"
    assert attempt(body).kind == "timeout"


def test_threads_cannot_stretch_the_time():
    """Where threads are allowed: one that works on while the main thread sleeps ends with it."""
    body = (
        "for i in range(4):\n    threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\ntime.sleep(60)"
    )
    before = children()
    assert attempt(body, Sandbox(SMALL, threads=True)).kind in ("timeout", "raised")
    assert attempt(
        "thread = threading.Thread(target=print)\nthread.start()\nthread.join()", Sandbox(SMALL, threads=True)
    ).is_value
    assert attempt("return os.fork()", Sandbox(SMALL, threads=True)).kind == "raised"
    assert children() == before


def task(expected: object, tests: str = "") -> CodeTask:
    return CodeTask("t", "p", "solve", (Call((1,), expected),), (Asserts(tests or f"assert solve(1) == {expected!r}"),))


CHEATS = {
    "an object equal to everything": "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\ndef solve(x): return E()",
    "a list equal to everything": "class E(list):\n    def __eq__(self, o): return True\ndef solve(x): return E()",
    "no assertions": "import builtins\nbuiltins.AssertionError = ValueError\ndef solve(x): return 0",
    "a patched comparison": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('same_value', 'check'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)\ndef solve(x): return 0",
    "an exit before the tests": "import sys\nsys.exit(0)",
    "an exit in the function": "import os\ndef solve(x): os._exit(0)",
    "an exit when it is over": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef solve(x): return 0",
    "printed verdicts": "print('{\"value\": true}')\nprint('PASSED')\nprint('ok')\ndef solve(x): return print('1 passed')",
    "verdicts into every pipe": (
        "import os, json, struct\n"
        "def say(data):\n"
        "    frame = json.dumps(data).encode()\n"
        "    for fd in range(3, 20):\n"
        "        try: os.write(fd, struct.pack('!I', len(frame)) + frame)\n"
        "        except OSError: pass\n"
        "def solve(x):\n"
        "    for data in ({'value': True}, {'passed': True}, {'verdict': 'passed', 'value': None}): say(data)\n"
        "    return 0"
    ),
    "questions to the parent": (
        "import os, json, struct\n"
        "def solve(x):\n"
        "    frame = json.dumps({'ask': [1], 'kwargs': {'dict': []}}).encode()\n"
        "    for fd in range(3, 20):\n"
        "        try: os.write(fd, struct.pack('!I', len(frame)) + frame)\n"
        "        except OSError: pass\n"
        "    return 0"
    ),
    "tests in memory": (
        "import gc\n"
        "def solve(x):\n"
        "    return next((o for o in gc.get_objects() if isinstance(o, dict) and 41 in list(o.values())), 0)"
    ),
}


@pytest.mark.parametrize("source", CHEATS.values(), ids=CHEATS)
def test_no_verdict_can_be_forged(source):
    judge, asked = ProgramJudge(Sandbox(SMALL)), task(41)
    assert not any(judge.public(asked, source).passed)
    assert not judge.passes(asked, source)


def test_the_right_program_passes_and_its_tests_run_elsewhere():
    judge = ProgramJudge(Sandbox(SMALL))
    seen = "import sys\ndef solve(x):\n    assert 'unittest_marker' not in sys.modules\n    return x + 40"
    tests = "import sys\nsys.modules['unittest_marker'] = sys\nassert solve(1) == 41\nassert candidate(x=2) == 42"
    assert judge.passes(task(41, tests), seen)
    assert not judge.passes(task(41, tests + "\nassert solve(1) == 40"), seen)


def test_an_exception_of_the_function_reaches_the_tests_as_its_type():
    tests = "try:\n    solve(1)\nexcept KeyError:\n    pass\nelse:\n    assert False"
    judge = ProgramJudge(Sandbox(SMALL))
    assert judge.passes(task(0, tests), "def solve(x): raise KeyError(x)")
    assert not judge.passes(task(0, tests), "def solve(x): raise IndexError(x)")
    assert not judge.passes(task(0, tests), "def solve(x): return x")


def test_a_program_reads_its_input_and_is_judged_by_what_it_prints():
    asked = CodeTask("t", "p", "", (Program("2\n3\n", "5\n"),), (Program("2 2", "4"),))
    judge = ProgramJudge(Sandbox(SMALL))
    source = "import sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')\nsys.exit(0)"
    assert judge.public(asked, source).passed == (True,)
    assert judge.passes(asked, source)
    assert not judge.passes(asked, "print(5)")
    assert not judge.passes(asked, source.replace("exit(0)", "exit(1)"))


def run_with(change: str) -> dict[str, bool]:
    """What holds when a layer is missing."""
    code = (
        "import json, tts_search.domains.code.sandbox as s\n"
        f"s._START = s._START.replace('from tts_search.domains.code.worker', {change!r} + '\\nfrom tts_search.domains.code.worker')\n"
        "with s.Sandbox(require=s.Level.LIMITS).open() as session:\n"
        "    print(json.dumps([session.held, session.level.name]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_what_holds_is_found_out_and_not_believed():
    module = "import tts_search.domains.code.confine as c; "
    held, level = run_with(module + "c._landlock = lambda *a: None")
    assert level == "LIMITS"
    assert not held["files"]
    held, level = run_with(module + "c._seccomp = lambda *a: None")
    assert level == "FILES"
    assert not held["processes"]
    held, level = run_with(module + "c._seccomp = lambda *a: None; c._namespaces = lambda *a: None")
    assert not held["network"]  # Landlock knows no datagrams


def test_less_than_what_is_required_runs_nothing(monkeypatch):
    without = "import tts_search.domains.code.confine as c; c._landlock = lambda *a: None\n"
    start = sandbox_module._START.replace(
        "from tts_search.domains.code.worker", without + "from tts_search.domains.code.worker"
    )
    monkeypatch.setattr(sandbox_module, "_START", start)
    before = children()
    with pytest.raises(SandboxError, match=r"expected level FULL, got LIMITS.*files.*Level\.LIMITS"):
        Sandbox().open()
    assert children() == before
    with Sandbox(require=Level.LIMITS).open() as session:
        assert session.load("x = 1").is_value
    assert Sandbox().level() == Level.LIMITS


def test_a_process_without_a_parent_ends():
    code = (
        "import os, signal, sys\n"
        "from tts_search.domains.code import Sandbox\n"
        "session = Sandbox().open()\n"
        "print(session._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    for _ in range(100):
        if sandbox_module._state(child) in ("", "Z"):
            return
        signal.sigtimedwait([], 0.05)
    raise AssertionError("it lives")


WRITERS = [
    f"open({folder + 'attack'!r}, 'w').write('x')" for folder in ("", "./", "/tmp/", "/var/tmp/", "/dev/shm/", "/")
]
RIGHT = "def solve(x): return 41"
# One of each, and right ones between them: it is the loops that take time.
WRONG = (
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import os\nwhile True: os.fork()",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
    "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)",
    "import threading\nfor _ in range(9): threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "import contextlib, tempfile\ntempfile.mkstemp(prefix='attack')\n"
    + "".join(f"with contextlib.suppress(OSError): {line}\n" for line in WRITERS)
    + "def solve(x): return x",
    "import os\nos._exit(3)",
    "held = bytearray(10**10)",
    "while True: print('x' * 1000)",
    "def solve(x:",
)
CANDIDATES = [RIGHT, *(each for wrong in WRONG for each in (wrong, RIGHT)), RIGHT, RIGHT]


@pytest.fixture
def _orphans_are_ours():
    """Processes whose parents have gone become children of this one, and are seen."""
    prctl, set_subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(set_subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(set_subreaper, 0, 0, 0, 0)


def check_that_nothing_is_left(count: int) -> None:
    before, files = children(), len(os.listdir("/proc/self/fd"))
    assert not names()
    for number in range(count):
        program = CANDIDATES[number % len(CANDIDATES)]
        judge = ProgramJudge(Sandbox(replace(SMALL, wall_s=0.3)))
        assert judge.public(task(41), program).passed == (program == RIGHT,), program
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files
    assert not names()


@pytest.mark.usefixtures("_orphans_are_ours")
def test_fifty_candidates_leave_nothing():
    check_that_nothing_is_left(50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_orphans_are_ours")
def test_a_thousand_candidates_leave_nothing():
    check_that_nothing_is_left(1000)
