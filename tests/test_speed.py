"""The speed measurements: everything about them but the times."""

import csv
import json
import platform
import resource
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from invref.catalogue import ROWS
from invref.errors import InvrefError
from verify import (
    cli,
    speed_cases,
    speed_clock,
    speed_command,
    speed_compile,
    speed_first,
    speed_peers,
    speed_plot,
    speed_stats,
    speed_step,
    speed_table,
)
from verify.speed_record import COLD, COPY, NATIVE, OURS, THEIRS, WARM, Timing
from verify.speed_stats import Spread
from verify.speed_step import Step

GELU = ROWS["gelu"]
ABOUT = {
    "cpu": "some", "cores": 2, "load": 0.5, "platform": "Linux", "python": "3", "torch": "2", "numpy": "2",
    "llvmlite": None, "triton": None, "invref": "0", "date": "2026-11-24T00:00:00+00:00",
}  # fmt: skip
WIDTH, TOKENS = 8, 4


def timing(**changes):
    given = {"kind": "layer", "activation": "gelu", "dtype": "float32", "device": "cpu", "threads": 1, "n": 1 << 16}
    return Timing(**{**given, "contestant": OURS, **changes})


def layer(ratio, **changes):
    """The three lines of one case of a layer."""
    seconds = Spread(1e-4, 2e-4, 3e-4)
    rest = {"rounds": 9, "loops": 2, "seconds": seconds, "to_copy": Spread(2, 3, 4), "gigabytes": 1.0, "share": 0.5}
    return [
        timing(contestant=name, ratio=Spread(r / 2, r, 2 * r), **rest, **changes)
        for name, r in ((OURS, ratio), (THEIRS, 1.0), (COPY, 0.3))
    ]


# Statistics.


def test_percentiles_are_those_of_the_sample():
    assert speed_stats.spread(range(11)) == Spread(2, 5, 8)
    assert speed_stats.spread([7.0]) == Spread(7, 7, 7)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_there_are_no_percentiles_of_nothing_or_of_what_is_not_finite(values):
    with pytest.raises(ValueError, match="not all finite"):
        speed_stats.spread(values)


def test_ratios_and_differences_are_taken_within_pairs():
    # Rounds of very different length in which we take a tenth more, but for one: the quotient of the medians is 11.
    theirs, ours = [1.0, 2.0, 10.0, 100.0, 100.0], [1.1, 2.2, 110.0, 110.0, 110.0]
    assert speed_stats.ratio(ours, theirs).middle == pytest.approx(1.1)
    assert speed_stats.difference(ours, theirs) == speed_stats.spread(
        [a - b for a, b in zip(ours, theirs, strict=True)]
    )
    with pytest.raises(ValueError, match="cannot be paired"):
        speed_stats.ratio(ours, theirs[:-1])


# Turns.


class FakeClock:
    """Notes who runs and how often, and says how long that took."""

    def __init__(self, seconds):
        self.seconds, self.noted, self.last, self.spent = seconds, [], None, 0.0

    def run(self, name):
        def call():
            self.last = name

        return call

    def __call__(self, run, loops):
        run()
        self.noted.append((self.last, loops))
        self.spent += self.seconds[self.last] * loops
        return self.seconds[self.last] * loops


def interleaved(clock, seconds):
    runs = {name: clock.run(name) for name in clock.seconds}
    return speed_clock.interleaved(runs, clock, seconds, now=lambda: clock.spent)


@pytest.mark.parametrize("count", range(1, 8))
def test_everyone_has_every_place_and_comes_after_anyone_else_equally_often(count):
    names = [str(i) for i in range(count)]
    rounds = [speed_clock.order(names, turn) for turn in range(2 * count)]
    assert all(sorted(row) == names for row in rounds)
    places = Counter((name, place) for row in rounds for place, name in enumerate(row))
    assert set(places.values()) == {2}
    pairs = Counter(pair for row in rounds for pair in pairwise(row))
    assert set(pairs.values()) == ({2} if count > 1 else set())
    # Between rounds everyone comes after itself as often.
    seams = Counter(before[-1] for before, after in pairwise([*rounds, rounds[0]]) if before[-1] == after[0])
    assert set(seams) == set(names)
    assert len(set(seams.values())) == 1


def test_every_round_has_everyone_once_in_its_order():
    clock = FakeClock({OURS: 2.0, THEIRS: 1.0, COPY: 4.0})
    times = interleaved(clock, 0.0)
    order = [name for name, _ in clock.noted[3:]]  # the first three are the warm-up
    rounds = (speed_clock.order([OURS, THEIRS, COPY], turn) for turn in range(speed_clock.LEAST))
    assert order == list(chain.from_iterable(rounds))
    assert times.rounds == speed_clock.LEAST
    assert {name: set(taken.tolist()) for name, taken in times.seconds.items()} == {OURS: {2}, THEIRS: {1}, COPY: {4}}


def test_a_visit_goes_on_in_the_order_of_the_one_before():
    clock = FakeClock({OURS: 2.0, THEIRS: 1.0, COPY: 4.0})
    before = speed_clock.Times({name: np.ones(7) for name in clock.seconds}, 5)
    runs = {name: clock.run(name) for name in clock.seconds}
    times = speed_clock.interleaved(runs, clock, 0.0, before, now=lambda: clock.spent)
    rounds = (speed_clock.order([OURS, THEIRS, COPY], 7 + turn) for turn in range(speed_clock.LEAST))
    assert clock.noted == [(name, 5) for name in chain.from_iterable(rounds)]
    assert times.loops == 5


def test_everyone_has_run_before_the_first_sample():
    clock, called = FakeClock({OURS: 1.0, THEIRS: 1.0}), []
    runs = {name: lambda name=name: called.append(name) for name in clock.seconds}
    clock.last = OURS
    first = []

    def sampling(run, loops):
        first.append(len(called))
        return 1.0

    speed_clock.interleaved(runs, sampling, 0.0)
    assert first[0] == 2 * speed_clock.WARM


def test_rounds_go_on_until_the_time_is_spent_but_not_for_ever():
    assert interleaved(FakeClock({OURS: 1.0}), 20.0).rounds == 20
    assert interleaved(FakeClock({OURS: 1.0}), 1e9).rounds == speed_clock.MOST


def test_a_sample_is_long_enough_for_the_clock():
    clock = FakeClock({OURS: 1e-5, THEIRS: 3e-5})
    times = interleaved(clock, 0.0)
    assert times.loops == 20  # FINEST over the fastest
    assert {loops for _, loops in clock.noted[2:]} == {20}
    assert times.seconds[OURS] == pytest.approx(1e-5)


HEAP = """
import resource, torch
from verify import speed_clock

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def call():
    first = torch.ones(1 << 20)
    between = torch.ones(1 << 15)
    second = torch.ones(1 << 20)
    del first, between

speed_clock.settle()
for _ in range(5):
    call()
before = faults()
for _ in range(20):
    call()
print((faults() - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what GNU's C library does")
def test_memory_that_was_freed_is_not_returned_to_the_system():
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    pages = 2 * (4 << 20) / resource.getpagesize()
    # Unsettled, nearly all of them in every call; settled, in one at most until the heap has its size.
    assert float(done.stdout) < pages / 2


def test_the_processor_clock_calls_as_often_as_it_says():
    calls = []
    assert speed_clock.HostClock()(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5


def test_the_clock_of_a_gpu_empties_the_cache_before_every_call(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, _other):
            assert happened[-1] == "synchronize"
            return 1.5  # milliseconds

    class Properties:
        L2_cache_size = 100

    monkeypatch.setattr(speed_clock, "FLUSH", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: happened.append("synchronize"))
    clock = speed_clock.EventClock(torch.device("cpu"))
    assert clock._flush.numel() == 200  # twice the cache
    monkeypatch.setattr(clock, "_flush", type("Buffer", (), {"zero_": lambda _: happened.append("flush")})())
    assert clock(lambda: happened.append("call"), 2) == pytest.approx(3e-3)
    assert happened == ["flush", "record", "call", "record"] * 2 + ["synchronize"]


def test_the_number_of_threads_is_as_before_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), speed_clock.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_work_of_others_is_what_the_cores_did_and_we_did_not():
    before, after = speed_clock._Busy(10.0, 100.0, 5.0), speed_clock._Busy(12.0, 103.0, 7.0)
    assert after.others(before) == 0.5
    assert speed_clock._Busy(12.0, None, 7.0).others(before) is None


def test_a_system_that_does_not_tell_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(speed_clock, "STAT", tmp_path / "none")
    assert interleaved(FakeClock({OURS: 1.0}), 0.0).others is None


# Single layers.


def test_a_layer_is_timed_on_the_same_numbers_as_torchs():
    x, dy = speed_cases.inputs(1000, torch.bfloat16, "cpu")
    again, _ = speed_cases.inputs(1000, torch.bfloat16, "cpu")
    assert torch.equal(x, again)
    assert (x.dtype, x.requires_grad, dy.requires_grad) == (torch.bfloat16, True, False)
    assert 0.9 < float(x.detach().std()) < 1.1
    assert not torch.equal(x, dy)


def test_a_pass_runs_backward_and_leaves_nothing_behind():
    x, dy = speed_cases.inputs(10, torch.float32, "cpu")
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.clone())
            return grad

    assert speed_cases.forward_backward(Square.apply, x, dy)() is None
    assert torch.equal(seen[0], dy)
    assert x.grad is None


def test_bytes_and_shares_are_those_of_what_must_cross_the_bus():
    times = speed_clock.Times({OURS: [2e-3] * 6, THEIRS: [1e-3] * 6, COPY: [1e-3] * 6}, 1, 0.1)
    ours, theirs, copied = speed_cases.timings("layer", "gelu", "float32", "cpu", 1, 10**6, times, 4)
    assert copied.gigabytes == pytest.approx(8.0)  # 8 MB in a millisecond
    assert theirs.gigabytes == pytest.approx(20.0)
    assert ours.share == pytest.approx(10 / 8)
    assert ours.ratio == Spread(2, 2, 2)
    assert ours.overhead == Spread(1e-3, 1e-3, 1e-3)
    assert {t.others for t in (ours, theirs, copied)} == {0.1}


def test_a_small_tensor_needs_no_copy():
    times = speed_clock.Times({OURS: [2e-6] * 6, THEIRS: [1e-6] * 6}, 1)
    ours, _ = speed_cases.timings("small", "gelu", "float32", "cpu", 1, 64, times, 0)
    assert (ours.to_copy, ours.gigabytes, ours.share) == (None, None, None)


# A whole step.


@pytest.fixture
def step():
    return Step.of(WIDTH, TOKENS, torch.float32)


def test_kept_bytes_are_those_of_a_known_step(step):
    x, hidden = 4 * TOKENS * WIDTH, 4 * TOKENS * WIDTH * speed_step.WIDER
    assert speed_step.kept(step, step.plain(functional.gelu)) == x + 2 * hidden
    assert speed_step.kept(step, step.plain(torch.relu)) == x + hidden  # it keeps its output, as the next layer does
    assert speed_step.kept(step, step.checkpointed(functional.gelu)) == x + hidden


def test_invrefs_layer_keeps_the_output_and_its_bits(step):
    x, hidden = 4 * TOKENS * WIDTH, 4 * TOKENS * WIDTH * speed_step.WIDER
    more = speed_step.kept(step, step.plain(GELU.layer)) - x - hidden
    n = TOKENS * WIDTH * speed_step.WIDER
    assert n // 8 <= more <= n // 8 + 64 + 64


def test_kept_storages_count_once_and_whole(step):
    class Views(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            own = torch.zeros(100)
            ctx.save_for_backward(own[:10], own[50:], step.first[0].t())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert speed_step.kept(step, Views.apply) == 400


def test_all_ways_but_the_compiled_compute_the_same_step(step):
    ways = speed_step.contestants(GELU)
    outputs = [ways[name](step)(step.x) for name in (speed_step.EAGER, speed_step.CHECKPOINT, speed_step.STEP_OURS)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_errors_are_relative_distances(step):
    double = step.double()
    exact = double.gradients(double.plain(functional.gelu))
    assert speed_step.errors(exact, exact) == (0, 0)
    off = [exact[0] * 1.5, exact[1] * 0.75, *exact[2:]]
    assert speed_step.errors(off, exact) == (pytest.approx(0.5), pytest.approx(0.25))
    broken = [exact[0].clone().fill_(float("nan")), *exact[1:]]
    assert speed_step.errors(broken, exact)[0] is None


def test_a_way_that_fails_has_a_line_that_says_why(monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setattr(speed_step, "compiled", fail)
    lines = {t.contestant: t for t in speed_step.measure(GELU, TOKENS, "float32", "cpu", 1, 0.0, WIDTH)}
    assert list(lines) == list(speed_step.contestants(GELU))
    assert lines[speed_step.COMPILED].note == "RuntimeError: no compiler here"
    assert lines[speed_step.COMPILED].seconds is None
    assert lines[speed_step.STEP_OURS].note == ""
    assert lines[speed_step.EAGER].ratio == Spread(1, 1, 1)
    assert lines[speed_step.STEP_OURS].kept < lines[speed_step.EAGER].kept
    # Far below the error floor of single gradients, and not 0: the float64 step is another.
    assert 0 < lines[speed_step.EAGER].error_input < 1e-5
    assert 0 < lines[speed_step.STEP_OURS].error_input < 1e-4


@pytest.mark.slow
def test_compiled_with_a_memory_budget_keeps_less(step):
    ways = speed_step.contestants(GELU)
    with speed_compile.quiet():
        kept = {name: speed_step.kept(step, ways[name](step)) for name in (speed_step.COMPILED, speed_step.BUDGETED)}
    assert kept[speed_step.BUDGETED] < kept[speed_step.COMPILED]


def test_what_is_compiled_is_a_copy_with_the_same_results(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append((function, options)) or function)

    def twice(x):
        return 2 * x

    called = []
    results = [speed_compile.compiled(twice, called.append) for _ in range(2)]
    assert [result(3) for result in results] == [6, 6]
    assert called == results
    assert len({id(function.__code__) for function, _ in compiled} | {id(twice.__code__)}) == 3
    assert all(options["fullgraph"] for _, options in compiled)


def test_a_reason_is_one_short_line():
    assert speed_compile.reason(ValueError("\n  bad  \nmore")) == "ValueError: bad"
    assert speed_compile.reason(ValueError()) == "ValueError: no message"
    assert len(speed_compile.reason(ValueError("x" * 1000))) == speed_compile.LONGEST


# Peers.


def peers(monkeypatch, make):
    monkeypatch.setattr(speed_peers, "PEERS", (speed_peers.Peer("theirs", make),))
    ours, theirs = speed_peers.measure(GELU, 1000, "float32", "cpu", 1, 0.0)
    assert ours.contestant == OURS
    assert ours.error_input < 1e-4
    return theirs


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch):
    def make(*arguments):
        return speed_peers._imported("not_there_at_all", "this-package", *arguments)

    assert peers(monkeypatch, make).note == "not installed: pip install this-package"


def test_a_peer_that_fails_says_why(monkeypatch):
    def broken(x):
        raise RuntimeError("no kernel")

    assert peers(monkeypatch, lambda *_: broken).note == "RuntimeError: no kernel"


def test_a_peer_is_compared_with_torch_and_with_the_exact_gradient(monkeypatch):
    theirs = peers(monkeypatch, lambda *_: lambda x: 2 * functional.gelu(x))
    assert theirs.error_input == pytest.approx(1, rel=1e-5)
    assert theirs.ratio is not None
    assert theirs.note == ""


def test_a_peer_whose_gradient_is_not_finite_is_told_so(monkeypatch):
    theirs = peers(monkeypatch, lambda *_: lambda x: functional.gelu(x) * torch.where(x.detach() > 0, torch.inf, 1.0))
    assert theirs.error_input is None
    assert " of 1,000 gradients are not finite" in theirs.note


def test_peers_serve_the_activations_they_have():
    served = {peer.name: [name for name in ("gelu", "mish") if peer.serves(name)] for peer in speed_peers.PEERS}
    assert served["optiacts"] == ["gelu"]
    assert served["torch.compile"] == ["gelu", "mish"]


# Records and tables.


@pytest.mark.parametrize(
    ("changes", "target", "missed"),
    [
        ({"ratio": Spread(1.0, 1.05, 2.0)}, 1.05, False),
        ({"ratio": Spread(1.0, 1.06, 2.0)}, 1.05, True),
        ({"ratio": None}, 1.05, True),
        ({"ratio": Spread(0.9, 1.04, 1.1), "device": "cuda"}, 1.03, True),
        ({"ratio": Spread(0.9, 1.19, 1.3), "activation": "silu", "dtype": "bfloat16"}, 1.2, False),
        ({"ratio": Spread(9, 9, 9), "dtype": "float16"}, None, False),
        ({"ratio": Spread(9, 9, 9), "activation": "elu"}, None, False),
        ({"ratio": Spread(9, 9, 9), "contestant": THEIRS}, None, False),
        ({"kind": "small", "overhead": Spread(0, 31e-6, 1)}, 30e-6, True),
        ({"kind": "small", "overhead": Spread(0, 29e-6, 1)}, 30e-6, False),
        ({"kind": "first", "contestant": COLD, "seconds": Spread(1, 3.5, 4)}, 3.0, True),
        ({"kind": "first", "contestant": WARM, "seconds": Spread(0.1, 0.2, 0.4)}, 0.3, False),
        ({"kind": "first", "contestant": NATIVE, "seconds": Spread(1, 1, 1)}, None, False),
        ({"kind": "step", "ratio": Spread(9, 9, 9)}, None, False),
    ],
)
def test_targets_are_held_to_the_median(changes, target, missed):
    made = timing(**changes)
    assert (made.target, made.missed) == (target, missed)


def test_a_timing_survives_json():
    made = timing(seconds=Spread(1, 2, 3), ratio=Spread(0.1, 0.2, 0.3), kept=7, others=0.25, note="so")
    assert Timing.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.9999, "1 s"), (0.0123, "12.3 ms"), (9.996e-4, "1 ms"), (1.234e-4, "123 µs"), (-2e-5, "-20 µs"),
     (0.0, "0 µs"), (1234.5, "1234 s")],
)  # fmt: skip
def test_durations_have_three_digits_and_a_unit(seconds, text):
    assert speed_table.duration(seconds) == text


def test_sizes_are_powers_of_two_where_they_are():
    assert [speed_table.size(n) for n in (1, 1 << 20, 1000)] == ["2^0", "2^20", "1,000"]


def test_the_csv_has_everything_in_a_line():
    made = [*layer(1.2), timing(kind="peer", contestant="theirs", note='not, "here"')]
    lines = list(csv.reader(speed_table.comma_separated(made, ABOUT).splitlines()))
    assert lines[0] == list(speed_table.COLUMNS)
    assert {len(line) for line in lines} == {len(speed_table.COLUMNS)}
    assert len(lines) == 5
    first, last = (dict(zip(lines[0], line, strict=True)) for line in (lines[1], lines[-1]))
    assert (first["cpu"], first["torch"], first["llvmlite"]) == ("some", "2", "")
    assert (float(first["ratio_p20"]), float(first["ratio_p50"]), float(first["ratio_p80"])) == (0.6, 1.2, 2.4)
    assert (float(first["target"]), first["missed"]) == (1.05, "1")
    assert (last["note"], last["seconds_p50"]) == ('not, "here"', "")
    # Whatever a timing has, the CSV has.
    for field in fields(Timing):
        assert any(column.removesuffix("_p50") == field.name for column in speed_table.COLUMNS), field.name


def test_tables_have_a_row_a_case_and_say_what_was_missed():
    made = [*layer(1.2), *layer(1.01, n=1 << 20), timing(kind="peer", contestant="theirs", note="not here")]
    sheets = {sheet.title.split(",")[0]: sheet for sheet in speed_table.sheets(made)}
    assert len(sheets["One layer"].rows) == 2
    assert "1.200 (0.600–2.400)" in sheets["One layer"].rows[0]
    assert "≤ 1.05, missed" in sheets["One layer"].rows[0]
    assert "≤ 1.05" in sheets["One layer"].rows[1]
    assert sheets["What else there is"].rows[0][-1] == "not here"
    (line,) = speed_table.missed(made)
    assert line == "MISSED gelu float32 n = 2^16, 1 thread: invref / torch: 1.200, target 1.05"
    assert speed_table.summary(made) == "1 of 2 targets met"
    text = speed_table.markdown(made, ABOUT)
    assert line in text
    assert "torch 2, llvmlite None, Python 3, some, 2 cores, load 0.50 at the start, 2026-11-24." in text
    widths = {row.count(" | ") for row in text.splitlines() if row.startswith("| gelu")}
    assert len(widths) == 1


def test_a_disturbed_timing_says_so():
    made = [replace(t, others=1.2) for t in layer(1.0)]
    assert speed_table.sheets(made)[0].rows[0][-1] == "1.2 cores busy with other work"
    assert speed_table.disturbed(made) == ["3 of 3 timings were disturbed: repeat them while nothing else runs"]
    assert speed_table.disturbed(layer(1.0)) == []


def test_a_case_that_failed_has_a_row():
    (sheet,) = speed_table.sheets([timing(note="RuntimeError: no")])
    assert sheet.rows[0][-1] == "RuntimeError: no"
    assert speed_table.missed([timing(note="RuntimeError: no")])[0].endswith("not measured, target 1.05")


def test_the_markdown_is_made_again_from_the_results(tmp_path):
    made = layer(1.2)
    results, out = tmp_path / "speed.json", tmp_path / "speed.md"
    results.write_text(json.dumps({"run": ABOUT, "timings": [t.to_json() for t in made]}))
    speed_table.write(results, out)
    assert out.read_text(encoding="utf-8") == speed_table.markdown(made, ABOUT)


# The picture.


def picture():
    return [t for dtype in ("float32", "bfloat16") for threads in (1, 2) for n, r in ((1 << 16, 1.1), (1 << 20, 0.9))
            for t in layer(r, dtype=dtype, threads=threads, n=n)]  # fmt: skip


def test_the_picture_has_a_panel_a_format_and_thread_count_with_the_line_at_1():
    panels = speed_plot.draw(picture(), "title").axes
    assert [panel.get_title() for panel in panels] == [
        f"{dtype}, {threads}" for dtype in ("float32", "bfloat16") for threads in ("1 thread", "2 threads")
    ]
    for panel in panels:
        lines = [list(line.get_ydata()) for line in panel.lines]
        assert [1, 1] in lines
        assert [1.1, 0.9] in lines
        assert panel.collections  # the band


def test_the_picture_is_the_same_every_time():
    assert speed_plot.svg(picture(), "title") == speed_plot.svg(picture(), "title")


def test_there_is_no_picture_of_nothing():
    with pytest.raises(ValueError, match="no ratios"):
        speed_plot.draw([timing(kind="small")], "title")


# The first call.


def test_the_first_call_is_that_of_a_new_process():
    found = speed_first.seconds("GELU()", "float32", "cpu", 1, tries=1, n=64)
    assert {name: len(taken) for name, taken in found.items()} == {"cold": 1, "warm": 1, "torch": 2, "import": 2}
    assert all(value > 0 for taken in found.values() for value in taken)


def test_a_first_call_that_fails_is_an_error_in_one_line():
    with pytest.raises(InvrefError, match="the first call of Nobody\\(\\) failed: NameError") as raised:
        speed_first.seconds("Nobody()", "float32", "cpu", 1, tries=1, n=64)
    assert "\n" not in str(raised.value)


# The command.


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["gleu"], "did you mean gelu"),
        (["--dtype", "float33"], "did you mean float32"),
        (["--parts", "layer"], "did you mean layers"),
        (["--threads", "0"], "ask for 1 to"),
        (["--threads", "100000"], "ask for 1 to"),
        (["--threads", "many"], "--help"),
        (["--sizes", "0"], "ask for 1 or more"),
        (["--sizes", "64", str(1 << 40)], "up to"),
        (["--seconds", "0"], "more than 0"),
        (["--seconds", "nan"], "more than 0"),
        (["--device", "abacus"], "use cpu"),
        (["--device", "meta"], "use cpu"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--json", "/nowhere/speed.json"], "a folder you may write"),
        (["--csv", "/"], "it is a folder"),
        (["--plot", "speed.png"], ".svg"),
        (["--plot", "speed.svg", "--parts", "small"], "leave out --plot"),
        (["--out", "/dev/null/nowhere"], "name another with --out"),
        (["--out", ".", "--json", "speed.json"], "leave out --json"),
    ],
)
def test_bad_input_exits_2_with_one_line_that_names_the_remedy(arguments, remedy, capsys, monkeypatch):
    monkeypatch.setattr(speed_command, "_timed", lambda *_: pytest.fail("the work has started"))
    assert cli.main(["speed", *arguments]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("invref-verify: ")
    assert remedy in err


TINY = ["speed", "gelu", "--dtype", "float32", "--threads", "1", "--sizes", "1000", "--seconds", "0.01"]


def test_a_small_run_writes_all_its_files(tmp_path, capsys):
    tmp_path /= "made/for/it"
    assert cli.main([*TINY, "--parts", "layers", "small", "--out", str(tmp_path)]) == cli.PASSED
    data = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    kinds = [(t["kind"], t["n"], t["contestant"]) for t in data["timings"]]
    assert kinds == [("layer", 1000, OURS), ("layer", 1000, THEIRS), ("layer", 1000, COPY), ("small", 64, OURS),
                     ("small", 64, THEIRS)]  # fmt: skip
    assert data["run"]["torch"] == torch.__version__
    made = [Timing.from_json(line) for line in data["timings"]]
    assert all(t.rounds >= speed_clock.LEAST for t in made)
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == speed_table.markdown(made, data["run"])
    assert (tmp_path / "speed.csv").read_text(encoding="utf-8") == speed_table.comma_separated(made, data["run"])
    assert (tmp_path / "speed.svg").read_text(encoding="utf-8").startswith("<?xml")
    out, err = capsys.readouterr()
    assert err == ""
    assert "One layer, forward and backward" in out
    assert "of 2 targets met" in out


@pytest.fixture
def slow_layer(monkeypatch):
    monkeypatch.setitem(speed_command._MEASURES, "layers", lambda *_: layer(1.2))


def test_a_missed_target_is_told_and_fails_a_strict_run_only(slow_layer, capsys):
    assert cli.main([*TINY, "--parts", "layers"]) == cli.PASSED
    assert "MISSED gelu float32" in capsys.readouterr().out
    assert cli.main([*TINY, "--parts", "layers", "--strict"]) == cli.VIOLATED


def test_measurements_are_gone_on_with_in_turns(monkeypatch, capsys, tmp_path):
    visits = []

    def measure(part, broken, row, n, *_):
        for visit in range(3):
            visits.append((part, row.name, visit))
            if (row.name, visit) == broken:
                raise RuntimeError("out of memory")
            if visit < 2:
                yield
        return [Timing(part, row.name, "float32", "cpu", torch.get_num_threads(), n, OURS, note="done")]

    monkeypatch.setitem(speed_command._MEASURES, "layers", partial(measure, "layer", ("silu", 1)))
    monkeypatch.setitem(speed_command._MEASURES, "small", partial(measure, "small", None))
    path = tmp_path / "speed.json"
    arguments = ["speed", "gelu", "silu", *TINY[2:], "--parts", "small", "layers", "--json", str(path)]
    assert cli.main(arguments) == cli.PASSED
    cases = [(part, name) for part in ("layer", "small") for name in ("gelu", "silu")]
    assert visits == [(*case, visit) for visit in range(3) for case in cases if (*case, visit) != ("layer", "silu", 2)]
    lines = json.loads(path.read_text(encoding="utf-8"))["timings"]
    assert [(line["kind"], line["activation"]) for line in lines] == cases
    assert [line["note"] for line in lines] == ["done", "RuntimeError: out of memory", "done", "done"]
    assert {line["threads"] for line in lines} == {1}


def test_visits_are_joined_round_by_round():
    visits = [
        speed_clock.Times({OURS: np.array([1.0, 2.0]), THEIRS: np.array([2.0, 2.0])}, 5, 0.1),
        speed_clock.Times({OURS: np.array([3.0]), THEIRS: np.array([1.0])}, 5, 0.4),
        speed_clock.Times({OURS: np.array([4.0]), THEIRS: np.array([1.0])}, 5, None),
    ]
    times = speed_clock.Times.joined(visits)
    assert {name: list(taken) for name, taken in times.seconds.items()} == {OURS: [1, 2, 3, 4], THEIRS: [2, 2, 1, 1]}
    assert (times.rounds, times.loops, times.others) == (4, 5, 0.4)
    assert speed_clock.Times.joined(visits[2:]).others is None


def test_later_visits_have_as_many_calls_a_sample_as_the_first(monkeypatch):
    asked = []

    def interleaved(runs, _clock, seconds, before):
        asked.append((seconds, before and (before.rounds, before.loops)))
        return speed_clock.Times({name: np.ones(2) for name in runs}, before.loops if before else 7)

    monkeypatch.setattr(speed_clock, "interleaved", interleaved)
    work = speed_cases.layer(ROWS["gelu"], 100, "float32", "cpu", 1, 2.0)
    with pytest.raises(StopIteration) as last:
        for _ in range(speed_cases.VISITS):
            next(work)
    assert asked == [(2.0 / speed_cases.VISITS, (2 * i, 7) if i else None) for i in range(speed_cases.VISITS)]
    assert {(t.rounds, t.loops) for t in last.value.value} == {(2 * speed_cases.VISITS, 7)}


def test_a_case_that_raises_does_not_stop_the_others(monkeypatch, capsys):
    def fail(*_arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(speed_command._MEASURES, "layers", fail)
    monkeypatch.setitem(speed_command._MEASURES, "first", fail)
    assert cli.main([*TINY, "--parts", "layers", "first", "small"]) == cli.PASSED
    out = capsys.readouterr().out
    assert out.count("RuntimeError: out of memory") == 2
    assert "A small tensor" in out


def test_nothing_is_drawn_where_no_layer_could_be_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(speed_command._MEASURES, "layers", lambda *_: [timing(note="RuntimeError: no")])
    assert cli.main([*TINY, "--parts", "layers", "--out", str(tmp_path)]) == cli.PASSED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.csv", "speed.json", "speed.md"]
    assert "nothing was drawn" in capsys.readouterr().err


def test_every_part_and_the_peers_are_asked_for_what_they_measure(monkeypatch):
    asked = []
    for part in speed_command._MEASURES:
        monkeypatch.setitem(
            speed_command._MEASURES, part, lambda *given, part=part: asked.append((part, *given[:5])) or []
        )
    threads = torch.get_num_threads()
    arguments = ["speed", "gelu", "--dtype", "bfloat16", "--threads", "1", "--sizes", "4", "8", str(1 << 22), "--peers"]
    assert cli.main(arguments) == cli.PASSED
    assert torch.get_num_threads() == threads
    sizes = {part: [n for p, _, n, *_ in asked if p == part] for part in speed_command._MEASURES}
    assert sizes == {
        "layers": [4, 8, 1 << 22],
        "small": [speed_cases.SMALL],
        "first": [speed_first.N],
        "step": [speed_step.TOKENS],
        "peers": [8],
    }
    assert {given[2:] for _, *given in asked for given in [tuple(given)]} == {("bfloat16", "cpu", 1)}


def test_only_layers_that_can_be_made_again_by_their_text_have_first_calls():
    import invref

    for row in ROWS.values():
        call = row.module if row.module.endswith(")") else f"{row.module}()"
        assert isinstance(eval(call, vars(invref.nn)), torch.nn.Module)
