import subprocess
import sys
from pathlib import Path

import pytest
import torch

from invref import cache, custom
from invref.custom import from_formula

TEXT = "x*sigmoid(1.25*x)"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("INVREF_CACHE", str(folder))
    return folder


@pytest.fixture
def fits(monkeypatch):
    """How often a decoder was fitted."""
    count = []
    fit = custom.binfit.fit
    monkeypatch.setattr(custom.binfit, "fit", lambda formula: (count.append(formula), fit(formula))[1])
    return count


def test_entries_come_back(place):
    assert cache.load("name") is None
    assert cache.store("name", "text\nof two lines")
    assert cache.load("name") == "text\nof two lines"
    assert [path.name for path in place.iterdir()] == ["name.json"]


def test_keys_tell_parts_apart():
    assert cache.key("ab", "c") != cache.key("a", "bc")


def test_place(monkeypatch):
    monkeypatch.delenv("INVREF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/invref")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.directory() == Path.home() / ".cache" / "invref"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.directory() == Path.home() / "Library" / "Caches" / "invref"


def test_one_fit_for_two_calls(fits):
    from_formula(TEXT)
    from_formula(TEXT, name="other")
    assert len(fits) == 1
    from_formula(TEXT.replace("1.25", "1.5"))
    assert len(fits) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("coefficients", "coefficientz"),
        lambda text: "\0\1\2" + text,
    ],
)
def test_damaged_entries_are_rebuilt(place, fits, damage):
    first = from_formula(TEXT)
    (entry,) = place.iterdir()
    good = entry.read_text()
    entry.write_text(damage(good))
    second = from_formula(TEXT)
    assert len(fits) == 2
    assert entry.read_text() == good
    x = torch.linspace(-5, 5, 100, requires_grad=True)
    assert torch.equal(*(torch.autograd.grad(a(x).sum(), x)[0] for a in (first, second)))


def test_undecodable_entries_are_rebuilt(place, fits):
    from_formula(TEXT)
    (entry,) = place.iterdir()
    entry.write_bytes(b"\xff\xfe" * 100)
    from_formula(TEXT)
    assert len(fits) == 2


def test_entries_of_another_formula_or_format_are_rebuilt(place, fits):
    from_formula(TEXT)
    (entry,) = place.iterdir()
    text = cache.load(entry.stem)
    other = text.replace("1.25", "1.75")
    cache.store(entry.stem, other)
    from_formula(TEXT)
    cache.store(entry.stem, "{}")
    from_formula(TEXT)
    assert len(fits) == 3
    assert cache.load(entry.stem) == text


def test_entries_of_other_versions_are_not_used(place, fits, monkeypatch):
    from_formula(TEXT)
    monkeypatch.setattr(custom, "_version", lambda: "another")
    from_formula(TEXT)
    assert len(fits) == 2
    assert len(list(place.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("INVREF_CACHE", str(blocked / "cache"))
    assert not cache.store("name", "text")
    assert cache.load("name") is None
    assert from_formula(TEXT).bits == 1


def test_a_read_only_place_is_read(place, fits, monkeypatch):
    from_formula(TEXT)

    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    from_formula(TEXT)
    from_formula("x*sigmoid(1.125*x)")
    assert len(fits) == 2
    assert len(list(place.iterdir())) == 1


def test_a_failed_replacement_leaves_nothing_behind(place, monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(cache.Path, "replace", refuse)
    assert not cache.store("name", "text")
    assert not list(place.iterdir())


def test_two_processes_at_once(place):
    program = f"import invref; print(invref.from_formula({TEXT!r}))"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1] != ""
    (entry,) = place.iterdir()
    assert cache.load(entry.stem) is not None
