"""What is compiled ahead, and in which order."""

import subprocess
import sys
import time
from threading import current_thread

import pytest

from llamajax.engine.ahead import AheadCompiler
from llamajax.engine.programs import Compiled, Program
from llamajax.engine.runner import Runner
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.types import Request, SamplingParams

from ...tiny_model import answer_alone, count_compilations, no_programs, random_ids, tiny_runner

GREEDY = SamplingParams(temperature=0)


class Recorder(Runner):
    """A runner that notes what is compiled ahead."""

    def compile(self, program: Program) -> Compiled:
        if current_thread().name == "llamajax compiler":
            self.order = [*getattr(self, "order", []), program]
        return super().compile(program)


def compile_all(compiler: AheadCompiler) -> None:
    end = time.monotonic() + 120
    while compiler._next() is not None:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_after_it_nothing_compiles() -> None:
    with no_programs():
        engine = OneSlot(tiny_runner(256))
        compiler = AheadCompiler(engine, 256)
        compiler.expect(Request(random_ids(20), 5, GREEDY))
        compile_all(compiler)
    with count_compilations() as compiled:
        # A conversation: a question, one more, a long prompt that is cancelled, a small one, an answer that grows.
        list(Sequential(engine, Request(random_ids(20), 5, GREEDY)))
        list(Sequential(engine, Request(random_ids(40), 50, GREEDY)))
        long = Sequential(engine, Request(random_ids(200), 5, GREEDY))
        long.goes_on = lambda read: read < 100
        assert list(long) == []
        list(Sequential(engine, Request(random_ids(30), 5, GREEDY)))
        answer_alone(tiny_runner(200), Request(random_ids(100), 90, GREEDY))  # another context
    assert compiled == []


def test_what_a_request_needs_comes_first() -> None:
    runner = tiny_runner(256, has_pages=False)
    runner.__class__ = Recorder
    engine = OneSlot(runner)
    compiler = AheadCompiler(engine, 256)
    request = Request(random_ids(140), 100, GREEDY)
    with compiler.answering(request):
        assert compiler.wait(120)
        assert runner.order == [
            Program("empty_rows", 256),
            Program("prefill", 256, 16),
            Program("prefill", 256, 128),
            Program("decode", 256),
        ]
        list(Sequential(engine, request))
    compile_all(compiler)
    assert len(set(runner.order)) == len(runner.order)
    rest = [program.cache_len for program in runner.order[4:]]
    assert sorted(set(rest), key=rest.index) == [256, 128]
    assert set(runner.order) == set(engine.programs(256))


def test_a_closed_one_stops() -> None:
    compiler = AheadCompiler(OneSlot(tiny_runner(1024)), 1024)
    compiler.close()
    compiler.expect(Request([1], 1))
    assert not compiler.wait(0.2)


def test_a_program_that_fails_to_compile_does_not_keep_a_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_runner(1024)

    def fail(program: Program) -> None:
        raise MemoryError

    monkeypatch.setattr(runner, "compile", fail)
    compiler = AheadCompiler(OneSlot(runner), 1024)
    compiler.expect(Request([1], 1))
    assert compiler.wait(10)
    compiler.close()  # other tests count what compiles


def test_a_program_ends_while_it_compiles(default_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    program = """
import sys, time, llamajax
llm = llamajax.load(max_seq_len=512)
llm.compile_ahead(512).expect(llm.prepare("Hi")[0])
time.sleep(float(sys.argv[1]))
"""
    for seconds in ("0.05", "0.1", "1.5"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, seconds], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
