from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import near_turning_point

from invref import formats
from invref.errors import InputError, ProofError
from invref.pieces import turning_points
from verify import batches, foreign, shards, sweep, sweep32, targets, window64
from verify.measure import measure
from verify.oracle import FLOAT32, TOLERANCE
from verify.scan import Tally
from verify.window64 import Worst

GELU = targets.torch_itself("gelu")
DECODING = {"decoder error", "decoder error (scalar tail)"}
"""The checks of what only a decoder is held to: torch's gradient is that of x, not of the stored y."""


def faulty(change, target=GELU):
    """The target with its gradient changed by `change(x, dx)` on the way out."""

    def layer(x):
        inner = x.view_as(x)
        if inner.requires_grad:
            inner.register_hook(lambda dx: change(x.detach(), dx))
        return target.layer(inner)

    return replace(target, layer=layer)


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch):
    """Fewer inputs through the scalar tail, at 50 microseconds each: the widest outputs hold some 3000."""
    monkeypatch.setattr(sweep32, "WINDOW", 1 << 14)


def failed(record):
    return {check.name for check in record.failures}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_passes_every_check_in_sixteen_bits(dtype):
    record = sweep.run(GELU, dtype)
    assert record.verdict == "exhausted"
    assert record.passed
    assert record.inputs == formats.get(dtype).finite_count
    # torch rounds the exact derivative: half an ulp of a gradient between 1 and 2, and a little for its own arithmetic.
    assert record.native_error <= formats.get(dtype).ulp(1.0) / 2 + 1e-6


def test_torch_passes_every_check_of_a_sample_in_float32_but_the_decoder():
    record = sweep.run(GELU, "float32", samples=20_000)
    assert record.verdict == "failed"
    assert failed(record) == DECODING
    # The target is the framework's own layer, and the oracle's bound belongs to the worst error.
    assert record.worst_error == record.native_error + TOLERANCE


def test_a_sample_is_the_same_on_every_run():
    first, second = (sweep.run(GELU, "float32", samples=1000) for _ in range(2))
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_a_wrong_gradient_fails_with_the_input_where_it_is_worst():
    record = sweep.run(faulty(lambda x, dx: torch.where(x == 1.0, dx + 0.125, dx)), "bfloat16")
    assert record.verdict == "failed"
    assert failed(record) == {"gradient error", "gradient error (scalar tail)"}
    assert (record.worst_input.value, record.worst_input.piece) == (1.0, 1)
    assert record.reproduce == "python -m verify gradient gelu --dtype bfloat16 --input 0x3f80"


def test_a_gradient_that_is_wrong_in_short_tensors_only_is_caught():
    def change(x, dx):
        return dx + 1 if x.numel() <= batches.SLICE else dx

    names = failed(sweep.run(faulty(change), "float16"))
    assert "gradient error (scalar tail)" in names
    assert "gradient error" not in names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_nan_fails(dtype):
    record = sweep.run(faulty(lambda x, dx: torch.where(x == 1.0, torch.nan, dx)), dtype, samples=1000)
    assert {"finite gradients", "gradient error"} <= failed(record)
    assert np.isnan(record.worst_error)
    assert record.nonfinite_gradients == 1
    assert record.worst_input.value == 1.0


def test_non_finite_gradients_of_the_framework_are_reported_and_left_out_of_its_error():
    native = faulty(lambda x, dx: torch.where(x.abs() > 1e19, torch.nan, dx))
    record = sweep.run(replace(GELU, native=native.layer), "bfloat16")
    reported = next(check for check in record.checks if check.name.startswith("non-finite"))
    x = sweep.all_inputs(formats.get("bfloat16"))
    assert reported.measured == int((x.abs() > 1e19).sum())
    assert reported.holds
    assert record.native_error < 0.01


def test_inputs_that_are_not_run_or_run_twice_fail_the_count():
    def skipping(fmt):
        return fmt.tensor(fmt.first_ordinal + 64, fmt.finite_count - 64)

    def repeating(fmt):
        x = sweep.all_inputs(fmt)
        x[1] = x[0]
        return x

    for inputs in (skipping, repeating):
        record = sweep.run(GELU, "bfloat16", inputs=inputs)
        assert failed(record) == {"count"}
        assert record.inputs < record.checks[0].bound


def test_another_forward_fails():
    shifted = replace(GELU, layer=lambda x: GELU.layer(x) + torch.where(x.detach() == 2.0, 2.0**-6, 0.0).to(x.dtype))
    record = sweep.run(shifted, "bfloat16")
    assert {"forward identical", "forward identical (scalar tail)"} <= failed(record)


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_part_that_does_not_exist_is_refused(shard):
    with pytest.raises(InputError, match="part"):
        sweep.run(GELU, "float32", shard=shard)


def test_more_parts_than_shards_are_refused():
    with pytest.raises(InputError, match="ask for 2"):
        sweep.run(GELU, "float32", shard=(1, 1000))


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="1 or more"):
        sweep.run(GELU, "float32", samples=0)


def test_the_number_of_threads_is_as_before():
    before = torch.get_num_threads()
    sweep.run(GELU, "float16")
    assert torch.get_num_threads() == before


# --- float32 by shards ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    return sweep.oracle_of(GELU.formula)


def test_shards_hold_every_finite_input_once(oracle):
    plan = shards.plan(oracle)
    assert [shard.index for shard in plan] == list(range(len(plan)))
    assert plan[0].first == FLOAT32.first_ordinal
    assert all(before.stop == after.first for before, after in pairwise(plan))
    assert plan[-1].stop - plan[0].first == FLOAT32.finite_count
    assert all(shard.part.first <= shard.first < shard.stop <= shard.part.stop for shard in plan)
    parts = [shards.part_of(plan, (i, 7)) for i in range(1, 8)]
    assert sorted(shard.index for part in parts for shard in part) == list(range(len(plan)))


def test_small_shards_on_two_threads_give_what_large_ones_on_one_do(oracle):
    size = 1 << 15
    parts = [near_turning_point(part, size) for part in oracle.ranges]
    outcomes = []
    for step, threads in ((size, 1), (size // 4, 2)):
        starts = [(part, first) for part in parts for first in range(part.first, part.stop, step)]
        plan = [shards.Shard(i, part, first, first + step) for i, (part, first) in enumerate(starts)]
        results = sweep32.run_shards(GELU, oracle, plan, shards.Store(None, GELU), threads, lambda inputs: None)
        total = Tally()
        for shard in plan:
            total.add(results[shard.index].tally)
        pieces = ([shard for shard in plan if shard.part is part] for part in parts)
        outcomes.append((total, [sweep32.side_floor(GELU, oracle, piece, results) for piece in pieces]))
    (one, floors_of_one), (many, floors_of_many) = outcomes
    assert one.inputs == many.inputs == 2 * size
    assert one.worst.tolist() == many.worst.tolist()
    assert floors_of_one == floors_of_many


def test_the_floor_by_blocks_is_that_of_all_inputs_taken_together(oracle):
    size = 1 << 16
    for part in oracle.ranges:
        near = near_turning_point(part, size)
        plan = [shards.Shard(0, near, near.first, near.stop)]
        results = sweep32.run_shards(GELU, oracle, plan, shards.Store(None, GELU), 1, lambda inputs: None)
        measured = measure(GELU, FLOAT32, oracle, FLOAT32.tensor(near.first, size), batches.together)
        assert sweep32.side_floor(GELU, oracle, plan, results) == measured.floor > 1e-5


class Counted:
    """Counts the shards that are run, and stops like a user's Ctrl-C once `limit` have been."""

    def __init__(self, monkeypatch, limit=None):
        self.count, self.limit, self.honest = 0, limit, sweep32.run_shard
        monkeypatch.setattr(sweep32, "run_shard", self)

    def __call__(self, *arguments):
        if self.count == self.limit:
            raise KeyboardInterrupt
        self.count += 1
        return self.honest(*arguments)


def comparable(record):
    return replace(record, seconds=0.0)


def test_an_interrupted_run_resumes_with_the_shards_it_has_and_says_the_same(small, monkeypatch, tmp_path):
    torch.set_num_threads(1)
    undisturbed = sweep.run(GELU, "float32", state_dir=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counted(patch, limit=3)
        sweep.run(GELU, "float32", state_dir=tmp_path)
    counted = Counted(monkeypatch)
    told = []
    resumed = sweep.run(GELU, "float32", state_dir=tmp_path, progress=lambda done, total: told.append(done))
    assert counted.count == 1
    assert told == sorted(told)
    assert told[-1] == 1 << 16
    assert comparable(resumed) == comparable(undisturbed)


def test_a_shortened_float32_fails_the_count(small):
    record = sweep.run(GELU, "float32")
    assert "count" in failed(record)
    assert (record.inputs, record.checks[0].bound) == (1 << 16, FLOAT32.finite_count)


def test_parts_that_shared_a_folder_merge_into_the_record_of_one_run(small, monkeypatch, tmp_path):
    undisturbed = sweep.run(GELU, "float32")
    parts = [sweep.run(GELU, "float32", shard=(i, 3), state_dir=tmp_path) for i in (1, 2, 3)]
    assert [part.inputs for part in parts] == [1 << 15, 1 << 14, 1 << 14]
    assert all(part.coverage.startswith(f"part {i}/3") for i, part in enumerate(parts, 1))
    assert failed(parts[0]) <= DECODING
    counted = Counted(monkeypatch)
    merged = sweep.run(GELU, "float32", state_dir=tmp_path)
    assert counted.count == 0
    assert comparable(merged) == comparable(undisturbed)
    assert not list(tmp_path.iterdir())


def test_the_results_of_another_target_or_of_other_code_are_not_reused(small, monkeypatch, tmp_path):
    sweep.run(GELU, "float32", shard=(1, 2), state_dir=tmp_path)
    counted = Counted(monkeypatch)
    sweep.run(replace(GELU, label="another"), "float32", shard=(1, 2), state_dir=tmp_path)
    assert counted.count == 2
    monkeypatch.setattr(torch, "__version__", "another")
    sweep.run(GELU, "float32", shard=(1, 2), state_dir=tmp_path)
    assert counted.count == 4
    monkeypatch.setattr(shards, "sources", lambda target: [Path(shards.__file__)])
    sweep.run(GELU, "float32", shard=(1, 2), state_dir=tmp_path)
    assert counted.count == 6


def test_results_depend_on_the_source_of_both_packages_the_tables_and_the_layer():
    def layer(x):
        return x

    names = {path.name for path in shards.sources(replace(GELU, layer=layer))}
    assert {"naive.py", "taylor.py", "gelu.json", "scan.py", Path(__file__).name} <= names


def test_a_damaged_result_is_run_again(small, monkeypatch, tmp_path):
    before = sweep.run(GELU, "float32", shard=(1, 2), state_dir=tmp_path)
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:1000])
    counted = Counted(monkeypatch)
    after = sweep.run(GELU, "float32", shard=(1, 2), state_dir=tmp_path)
    assert counted.count == 2
    assert comparable(after) == comparable(before)


def test_the_first_error_of_a_layer_ends_the_run(small):
    def layer(x):
        raise ArithmeticError("broken layer")

    with pytest.raises(ArithmeticError, match="broken layer"):
        sweep.run(replace(GELU, layer=layer), "float32")


# --- float64 ----------------------------------------------------------------------------------------------


def test_torch_passes_every_check_in_float64_and_the_floor_is_that_of_its_lowest_outputs(monkeypatch):
    monkeypatch.setattr(window64, "HALF", 1 << 22)
    record = sweep.run(GELU, "float64", samples=500)
    assert record.verdict == "sampled"
    assert record.passed
    # 2^22 inputs on each side share the output nearest y*: the floor is half of f'' times the distance of the last one,
    # but for the few whose y is rounded otherwise.
    point = turning_points(GELU.formula)[0]
    distance = 2**22 * formats.get("float64").ulp(float(point.x))
    assert record.error_floor == pytest.approx(float(point.curvature) * distance / 2, rel=1e-3)


def test_a_float64_gradient_that_is_wrong_near_the_turning_point_only_is_caught(monkeypatch):
    monkeypatch.setattr(window64, "HALF", 1 << 18)
    wrong = faulty(lambda x, dx: torch.where((x + 0.7517915246935645).abs() < 1e-12, dx + 1e-8, dx))
    record = sweep.run(wrong, "float64", samples=500)
    assert failed(record) == {"gradient error"}
    assert record.worst_input.value == pytest.approx(-0.7517915246935645, abs=1e-11)


def test_the_worst_of_float64_values_is_nan_where_there_is_one():
    worst = Worst()
    worst.take(np.array([1.0, np.nan, 3.0]), np.array([10, 11, 12]))
    worst.take(np.array([5.0]), np.array([13]))
    assert np.isnan(worst.value)
    assert worst.at == 11


def test_a_nan_on_the_vector_path_alone_fails_its_limit():
    def layer(x):
        y = GELU.layer(x)
        if x.numel() >= 64 and bool((x == 1e20).all()):
            y = y + (x - x.detach()) * torch.nan
        return y

    record = sweep.run(replace(GELU, layer=layer), "float64", samples=100)
    assert "gradient at 1e20" in failed(record)


def test_inputs_that_no_piece_takes_fail_the_count(monkeypatch):
    oracle = sweep.oracle_of(GELU.formula)
    monkeypatch.setitem(vars(oracle), "ranges", oracle.ranges[1:])
    record = sweep.run(GELU, "bfloat16")
    assert "count" in failed(record)
    assert record.verdict == "failed"


def test_a_foreign_layer_is_told_its_decoder_error_but_not_held_to_it():
    record = sweep.run(replace(GELU, role="foreign"), "float32", samples=5000)
    assert not failed(record)
    assert any(check.name == "decoder error" and check.bound is None for check in record.checks)


def test_finished_shards_stay_where_the_caller_keeps_them(small, tmp_path):
    first = sweep.run(GELU, "float32", state_dir=tmp_path, keep=True)
    assert list(tmp_path.rglob("*.npz"))
    again = sweep.run(GELU, "float32", state_dir=tmp_path)
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_truth_that_cannot_be_bounded_is_unproved_and_passes_nothing(monkeypatch):
    def fail(*_, **__):
        raise ProofError("no bound at x = 3")

    monkeypatch.setattr(sweep.sweep64, "run", fail)
    record = sweep.run(GELU, "float64")
    assert record.verdict == "unproved"
    assert not record.passed
    assert record.inputs == 0
    assert "no bound at x = 3" in record.coverage
    assert np.isnan(record.worst_error)


def test_a_gradient_that_is_torch_s_own_is_compared_bit_for_bit_and_told_its_errors():
    record = sweep.run(targets.TARGETS["sigmoid"], "bfloat16")
    assert record.passed
    assert record.error_floor is None
    assert record.gain
    held = {check.name.removesuffix(" (scalar tail)") for check in record.checks if check.bound is not None}
    assert held == {"count", "forward identical", "gradient identical"}


def test_pieces_that_share_a_side_code_share_their_floor():
    # Told apart by y alone, the two sides of the turning point cannot be: the floor is half of all of f'.
    together = sweep.run(replace(GELU, codes=(0, 0)), "bfloat16")
    assert together.error_floor > 10 * sweep.run(GELU, "bfloat16").error_floor


def test_a_layer_for_a_formula_holds_every_bound():
    target = foreign.from_text("x * tanh(exp(x))")
    for dtype, samples in (("bfloat16", None), ("float32", 5000)):
        record = sweep.run(target, dtype, samples=samples)
        assert record.passed, record.failures
        assert record.forward_error_ulps <= 0.51
        assert record.reproduce.startswith("python -m verify gradient --formula 'x * tanh(exp(x))'")
