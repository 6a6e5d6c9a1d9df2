"""Training equivalence: statistics against textbook values, arms that differ in their gradient alone, whole runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import records

from invref.decoders import load
from invref.errors import InputError
from invref.formats import FORMATS
from invref.kernels import codes as codes_of
from verify import (
    floor,
    training_command,
    training_data,
    training_findings,
    training_record,
    training_run,
    training_stats,
)
from verify import training_arms as arms
from verify.cli import main
from verify.training_models import SHAPES, build
from verify.training_record import Run, Seed, Step

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

CPU = torch.device("cpu")
KINDS = ("gelu", "gelu_tanh", "silu")


def test_identical_runs_are_equivalent():
    found = training_stats.paired([0.0] * 5, 0.1)
    assert (found.verdict, found.p, found.power) == ("equivalent", 0.0, 1.0)


def test_the_interval_is_students():
    values = [0.1, 0.3, 0.2, 0.4, 0.5]
    found = training_stats.paired(values, 1.0)
    # Quantile 0.95 of t with 4 degrees of freedom, from printed tables.
    reach = 2.1318468 * np.std(values, ddof=1) / math.sqrt(5)
    assert found.low == pytest.approx(0.3 - reach, rel=1e-6)
    assert found.high == pytest.approx(0.3 + reach, rel=1e-6)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.01, -0.01, 0.02, -0.02], "equivalent"),
        ([2.0, 2.01, 1.99, 2.0], "different"),
        ([-2.0, -2.01, -1.99, -2.0], "different"),
        ([1.0, -1.0, 0.5, -0.5], "undecided"),
        ([0.0, 0.0, math.nan, 0.0], "different"),
        ([0.0, math.inf, 0.0, 0.0], "different"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(differences, verdict):
    assert training_stats.paired(differences, 0.1).verdict == verdict


def test_equivalence_is_found_in_error_at_most_as_often_as_the_level_says():
    rng = np.random.default_rng(0)
    runs = 2000
    wrong = sum(training_stats.paired(rng.normal(1.0, 0.3, 8), 1.0).verdict == "equivalent" for _ in range(runs))
    # Binomial with probability 0.05: four standard deviations above its mean.
    assert wrong / runs < 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)


def test_the_power_foretold_is_no_more_than_the_power_found():
    rng = np.random.default_rng(1)
    runs = 2000
    found = sum(training_stats.paired(rng.normal(0.0, 1.0, 12), 1.0).verdict == "equivalent" for _ in range(runs))
    assert training_stats.power(1.0, 12, 1.0) < found / runs + 4 * 0.5 / math.sqrt(runs)


def test_the_number_of_seeds_that_would_decide_decides():
    needed = training_stats.seeds_needed(0.0, 1.0, 0.5)
    assert needed is not None
    rng = np.random.default_rng(2)
    # Known spread and mean: at least the promised share decides, less the spread of 500 draws.
    decided = [training_stats.paired(rng.normal(0.0, 1.0, needed), 0.5).verdict == "equivalent" for _ in range(500)]
    assert np.mean(decided) > training_stats.POWER - 0.25
    assert training_stats.seeds_needed(0.5, 1.0, 0.5) is None


def test_the_margin_says_which_rule_gave_it():
    assert training_stats.margin([1.0, 1.0, 1.0]).value == pytest.approx(0.002)
    wide = training_stats.margin([1.0, 2.0, 3.0])
    assert wide.value == pytest.approx(0.1)
    assert "standard deviation" in wide.rule


def test_a_ratio_is_one_sided_and_nan_never_passes():
    assert training_stats.ratio([1e-9, 2e-9, 1.5e-9], [1.0, 1.0, 1.0]).verdict == "equivalent"
    assert training_stats.ratio([5.0, 5.1, 4.9], [1.0, 1.0, 1.0]).verdict == "different"
    assert training_stats.ratio([math.nan, 1.0, 1.0], [1.0, 1.0, 1.0]).verdict == "different"
    assert training_stats.ratio([0.0, 0.0], [1.0, 1.0]).verdict == "equivalent"


def test_the_same_seed_gives_the_same_batches_and_validation_is_apart():
    text = training_data.text(16)
    first, again = (list(text.batches(3, 4, 2)) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    inputs, labels = first[0]
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    digits = training_data.digits()
    assert len(digits.images) + len(digits.held_images) == 1797


def test_masked_text_is_guessed_only_where_it_is_masked():
    text = training_data.text(32, masked=True)
    inputs, labels = next(text.batches(0, 8, 1))
    assert torch.equal(inputs == text.symbols, labels != training_data.IGNORED)


def test_every_arm_is_told_in_words():
    assert tuple(training_findings.MEANING) == arms.ARMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_arm_has_natives_forward_and_only_native_its_gradient(kind, dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    native = arms.function(kind)(x)
    (slope,) = torch.autograd.grad(native.sum(), x)
    for arm in arms.ARMS:
        y = arms.maker(arm, 0, CPU)(kind)(x)
        (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, native), arm
        assert found.isfinite().all(), arm
        assert torch.equal(found, slope) == (arm == arms.NATIVE), arm


def around_turning_point(kind, fmt, width):
    """Inputs around the turning point, their (y, s) as one number, f', and how many ulp y is from the turning value."""
    decoder = load(kind)
    x = fmt.tensor(fmt.ordinal(float(decoder.turning_x)) - width, 2 * width)
    code = fmt.ordinals(arms.function(kind)(x))
    slope, _ = arms._derivatives(kind, x.double())
    distance = (code - fmt.ordinal(float(decoder.turning_y))).abs().numpy()
    return x, (2 * code + (slope > 0)).numpy(), slope.numpy(), distance


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_the_twins_noise_is_as_large_as_the_error_floor(kind, dtype):
    fmt, record = FORMATS[dtype], records()[kind, dtype]
    x, codes, slopes, _ = around_turning_point(kind, fmt, 1 << (6 if dtype == "bfloat16" else 16))
    largest = float(arms.floor(kind, x).max())
    # The twin's numbers are float32.
    assert largest == pytest.approx(floor.exact(codes, slopes), rel=2.0**-23)
    if record.forward.endswith(torch.backends.cpu.get_cpu_capability()):
        # The run counts the scalar tail, too, which rounds otherwise.
        assert largest <= record.error_floor * (1 + 2.0**-23)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_where_the_float32_floor_is_expanded_it_is_that_of_outputs_rounded_correctly(kind):
    x, codes, slopes, distance = around_turning_point(kind, FORMATS["float32"], 1 << 17)
    expanded = (distance > arms.NEAR) & (distance <= 2 * arms.NEAR)
    found, counted = float(arms.floor(kind, x)[expanded].max()), floor.exact(codes[expanded], slopes[expanded])
    # Counted among inputs that are an ulp of x apart, a range loses up to one of these at either end.
    _, bend = arms._derivatives(kind, x[expanded].double())
    assert found <= counted + float(bend.max()) * FORMATS["float32"].ulp(float(x[0]))
    # Rounding gives an output d ulp up a width of 1 / (2 sqrt(d)); a forward off by e, sqrt(d + e) - sqrt(d - e).
    turning = tuple(float(v) for v in (load(kind).turning_x, load(kind).turning_y))
    e, d = codes_of.astray(arms.function(kind), *turning), arms.NEAR + 1
    assert counted <= 2 * math.sqrt(d) * (math.sqrt(d + e) - math.sqrt(d - e)) * found


def test_noise_depends_on_the_seed_alone():
    x = torch.linspace(-3, 3, 1000, requires_grad=True)

    def gradient(seed):
        return torch.autograd.grad(arms.maker(arms.FLIPPED, seed, CPU)("silu")(x).sum(), x)[0]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "gpt2"])
def test_a_models_weights_depend_on_its_seed_alone(name):
    shape = SHAPES[name]
    data = shape.data()
    one, same, other = (build(shape, data.symbols, seed, arms.maker(arm, 0, CPU))
                        for seed, arm in ((1, arms.NATIVE), (1, arms.TWIN), (2, arms.NATIVE)))  # fmt: skip
    states = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    inputs, labels = next(data.batches(0, 2, 1))
    assert one(inputs).flatten(0, -2).shape[0] == labels.numel()


def test_the_rate_rises_then_falls_to_nearly_nothing():
    rates = [training_run.rate(step, 100) for step in range(100)]
    assert max(rates) == 1.0
    assert rates[0] < 0.1
    assert rates[-1] < 1e-3


def test_gradients_are_compared_by_parameter_and_nan_stays_nan():
    a = {"w": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1.0]).double()}
    moved = {"w": a["w"], "b": torch.tensor([1.1]).double()}
    found = training_run.compared(moved, a)
    assert (found.name, found.worst) == ("b", pytest.approx(0.1))
    assert -1 < found.cosine < 0
    assert math.isnan(training_run.compared({**a, "b": torch.tensor([math.nan]).double()}, a).worst)


def seed(number, **losses):
    """A made-up seed in which arms are as far from native as the keywords say."""

    def made(arm, apart):
        step = Step(apart, apart, "w", 0.0)
        return Run(arm, step, step, (1.0 + apart, 1.0 + apart), (apart, apart), 2.0 + apart, 0.5)

    # Without some spread no interval has a width; a hundredth is far below every difference here.
    jitter = 1 + 0.01 * (-1) ** number
    runs = [made("native", 0.0), *(made(arm, apart * jitter) for arm, apart in losses.items())]
    return Seed(number, (1, 2), 1e-3, 0.5, 1.0, tuple(runs))


def test_a_control_that_nothing_tells_apart_makes_the_run_worthless():
    good = training_findings.findings([seed(i, inverted=1e-6, twin=1e-6, coarse=1e-2) for i in range(4)])
    assert good.whole == "equivalent"
    assert good.told_apart("coarse")
    assert good.sensed == ["coarse"]
    quiet = training_findings.findings([seed(i, inverted=1e-6, twin=1e-6, coarse=1e-4) for i in range(4)])
    assert (quiet.whole, quiet.sensed) == ("equivalent", [])
    assert any("no control apart" in line for line in training_command.said(quiet, [seed(0, twin=1e-6)]))
    blind = training_findings.findings([seed(i, inverted=1e-6, twin=1e-6, coarse=1e-6) for i in range(4)])
    assert (blind.whole, blind.escaped) == (training_findings.WORTHLESS, ["coarse"])
    assert blind.reasons == "since no level tells apart: coarse"
    without = training_findings.findings([seed(i, inverted=1e-6, twin=1e-6) for i in range(4)])
    assert without.whole == training_findings.WORTHLESS


def test_an_arm_that_ends_elsewhere_is_different():
    found = training_findings.findings([seed(i, inverted=0.1, twin=1e-6, coarse=1e-2) for i in range(4)])
    assert found.whole == "different"
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert training_findings.from_json(written) == found
    assert found.reasons.startswith("over 4 seeds: the difference in validation loss, 0.0986 to 0.101 at 90 %, is out")


def test_a_run_whose_native_arm_is_not_finite_is_written_all_the_same():
    seeds = [seed(i, inverted=1e-6, twin=1e-6, coarse=1e-2) for i in range(3)]
    native = replace(seeds[0].runs[0], loss=math.nan)
    found = training_findings.findings([replace(seeds[0], runs=(native, *seeds[0].runs[1:])), *seeds[1:]])
    assert found.whole == "different"
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["margins"]["loss"]["value"] is None


@pytest.mark.parametrize("loss", [2.2628190517425537, 4.8568840026855469, 1.1754943508222875e-38])
def test_a_float32_comes_back_from_the_digits_kept(loss):
    assert np.float32(training_record._plain(loss)) == np.float32(loss)


@pytest.fixture(scope="module")
def trained():
    shape = replace(SHAPES["mlp"], width=16)
    return training_run.Trainer(shape, torch.float32, CPU, 12).seed(0, arms.ARMS)


def test_a_seed_trains_the_same_again(trained):
    shape = replace(SHAPES["mlp"], width=16)
    again = training_run.Trainer(shape, torch.float32, CPU, 12).seed(0, arms.ARMS)
    assert again.runs == trained.runs


def test_in_a_real_step_ours_is_near_and_controls_are_far(trained):
    ours = trained.run("inverted")
    assert ours.distances[-1] < 1e-4
    for control in arms.CONTROLS:
        run = trained.run(control)
        assert run.first.difference > 100 * ours.first.difference, control
        assert run.first.cosine < 0


def test_a_record_reads_back_and_refuses_other_settings(trained, tmp_path):
    path = tmp_path / "mlp.json"
    settings = training_record.Settings("mlp", "float32", 12, "cpu", arms.ARMS, 100, 64, 1e-3)
    broken = replace(trained, precision=math.inf)
    training_record.write(path, settings, [broken], None, 1.0)
    (read,) = training_record.resumed(path, settings)
    assert read.precision == math.inf
    assert read.runs[1].loss == pytest.approx(trained.runs[1].loss, rel=1e-6)
    with pytest.raises(InputError, match="steps 12, not 13"):
        training_record.resumed(path, replace(settings, steps=13))
    path.write_text("{}")
    with pytest.raises(InputError, match="remove it"):
        training_record.read(path)
    assert training_record.resumed(tmp_path / "none.json", settings) == []


def test_the_command_writes_what_it_found_and_goes_on_from_it(tmp_path, capsys):
    asked = ["training", "--model", "mlp", "--steps", "20", "--out", str(tmp_path), "--seeds"]
    main([*asked, "2"])
    printed = capsys.readouterr().out
    assert "verdict:" in printed
    before = json.loads((tmp_path / "mlp-float32.json").read_text())
    assert f"verdict: {before['findings']['verdict']}, " in printed
    main([*asked, "3", "--resume"])
    after = json.loads((tmp_path / "mlp-float32.json").read_text())
    assert after["seeds"][:2] == before["seeds"]
    assert len(after["seeds"]) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "vgg"], "use one of gpt"),
        (["--dtype", "int8"], "use one of float32"),
        (["--steps", "0"], "ask for 1 or more"),
        (["--seeds", "1"], "ask for 2 or more"),
        (["--resume"], "--out"),
        (["--out", "/dev/null/at/all"], "name another with --out"),
    ],
)
def test_wrong_arguments_are_refused_with_a_remedy(arguments, said, capsys):
    assert main(["training", *arguments]) == 2
    assert said in capsys.readouterr().err
