"""Evaluations that are killed and go on, what is taken for the same evaluation, and what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import OnDigits, digits, killed_and_restarted, small_acgan
from tiny_cases import equal_state
from torch import nn

from puat_fast import evaluation
from puat_fast.attacks.acgan_file import save_acgan
from puat_fast.evaluation import evaluate, latent, record
from puat_fast.evaluation import run as run_module
from puat_fast.evaluation.names import AttackSpec, parse_attack
from puat_fast.evaluation.record import Store, digest
from puat_fast.evaluation.run import Options, evaluate_run

SHORT_USONG = AttackSpec(name="usong", kind="usong", eps=0.1, step_size=0.1, num_steps=2, draws=3)


def same_end(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Two finished states, but for their times."""
    keys = ("columns", "examples", "noise")
    alike = equal_state({k: a[k] for k in keys if k in a}, {k: b[k] for k in keys if k in b})
    timing = {"attack_seconds": None}
    return alike and a.get("found", {}) | timing == b.get("found", {}) | timing


# -- an attack goes on to the bit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "after"), [("clean", 1), ("pgd-30", 1), ("pgd-30", 3)])
def test_images(name, after):
    measure = partial(evaluate.measure, OnDigits(), *digits(44), parse_attack(name), batch_size=8)
    whole = measure()
    parts, deaths = killed_and_restarted(measure, after)
    assert deaths == 6 // after  # even after the last batch
    assert same_end(parts, whole)
    if name != "clean":
        assert 3 < int(whole["columns"]["right"].sum()) < 41 and len(whole["examples"]["index"]) == 10


class Quantised(OnDigits):
    """Behind a step function: no gradient anywhere."""

    def forward(self, x):
        return super().forward((x * 16).round() / 16)


def test_what_pgd_warns_of_is_told_once_and_after_a_kill_too():
    measure = partial(evaluate.measure, Quantised(), *digits(20), parse_attack("pgd-8"), batch_size=8)
    with warnings.catch_warnings(action="error"):
        whole = measure()
        parts, deaths = killed_and_restarted(measure, 1)
    assert deaths == 3 and same_end(parts, whole)
    (text,) = evaluate.summary(parse_attack("pgd-8"), whole)["warnings"]
    assert "zero gradient at 8 of 8 starting points" in text and text.endswith("(in the first of 3 batches like this)")
    assert "warnings" not in evaluate.evaluate(OnDigits(), *digits(8), parse_attack("pgd-8"))


@pytest.mark.parametrize("compat", ["none", "official-v1"])
@pytest.mark.parametrize("spec", [parse_attack("gpgd-0.1"), SHORT_USONG], ids=lambda spec: spec.name)
def test_latents(spec, compat):
    acgan = small_acgan()
    before = {name: b.clone() for name, b in acgan.D.named_buffers()}
    measure = partial(latent.measure, OnDigits(), acgan, digits(14)[1], spec, batch_size=6, compat=compat)
    whole = measure()
    parts, deaths = killed_and_restarted(measure, 1)
    assert deaths == -(-14 * spec.draws // 6) and same_end(parts, whole)
    assert equal_state(before, dict(acgan.D.named_buffers()))  # the next attack starts as this one did


def test_autoattack(monkeypatch):
    attack = evaluate.autoattack
    short = {"num_queries": 30, "num_targets": 2}
    monkeypatch.setattr(evaluate, "autoattack", lambda *a, **k: attack(*a, **(k | short)))
    monkeypatch.setattr(evaluate, "SAVE_EVERY", 0.0)
    spec = AttackSpec(name="aa", kind="aa", eps=20 / 255, step_size=None, num_steps=10)
    measure = partial(evaluate.measure, OnDigits(), *digits(16), spec, batch_size=8)
    whole = measure()
    parts, deaths = killed_and_restarted(measure, 4)
    assert deaths > 2 and same_end(parts, whole)
    assert set(whole["found"]["broken_by"]) - {None, "clean"}


def test_seconds_are_those_of_all_sessions():
    measure = partial(evaluate.measure, OnDigits(), *digits(8), parse_attack("clean"), batch_size=8)
    saved = measure() | {"seconds": 100.0}
    assert measure(saved=saved)["seconds"] > 100


# -- which evaluation is the same ------------------------------------------------------------------------------------


def measured(path: Path, out: Path, attack: str = "pgd-8", **options: Any) -> dict[str, Any]:
    """The result of an attack on 12 images, and under "batches" how often its progress was told."""
    told: list[Any] = []
    settings = Options(**({"n": 12, "batch_size": 4, "device": "cpu", "out": out} | options))
    found = evaluate_run(path, [attack], settings, progress=lambda *args: told.append(args))
    return found.result["attacks"][attack] | {"batches": len(told)}


def test_what_was_measured_is_kept_and_fresh_measures_anew(run, tmp_path):
    first = measured(run, tmp_path)
    again = measured(run, tmp_path)
    assert (first["kept"], first["batches"]) == (False, 4) and (again["kept"], again["batches"]) == (True, 0)
    same = ("accuracy", "correct", "n", "seconds", "measured")
    assert [again[key] for key in same] == [first[key] for key in same]
    fresh = measured(run, tmp_path, fresh=True)
    assert not fresh["kept"] and fresh["batches"] == 4 and fresh["correct"] == first["correct"]
    assert len(list((tmp_path / "attacks").iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [{"n": 11}, {"seed": 1}, {"batch_size": 5}, {"precision": "bf16"}, {"attack": "pgd-7"}, {"mean": (0.1, 0.2, 0.3)}],
    ids=str,
)
def test_other_settings_are_another_evaluation(run, tmp_path, other):
    if "mean" in other:  # our files tell theirs: weights without them
        from safetensors.torch import load_file, save_file

        plain = tmp_path / "plain.safetensors"
        save_file(load_file(run / "classifier.safetensors"), plain)
        std = {"std": (0.5, 0.5, 0.5), "dataset": "digits"}
        measured(plain, tmp_path, mean=(0.1, 0.2, 0.4), **std)
        assert not measured(plain, tmp_path, **other, **std)["kept"]
        return
    measured(run, tmp_path)
    assert not measured(run, tmp_path, **other)["kept"]
    assert measured(run, tmp_path)["kept"]  # both are there


def test_a_precision_of_another_attack_does_not_matter(run, tmp_path):
    settings = {"n": 8, "device": "cpu", "out": tmp_path}
    evaluate_run(run, ["clean", "pgd-8"], Options(**settings))
    found = evaluate_run(run, ["clean", "pgd-8"], Options(precision="fp32,pgd-8=bf16", **settings)).result["attacks"]
    assert found["clean"]["kept"] and not found["pgd-8"]["kept"] and found["pgd-8"]["precision"] == "bf16"


def test_other_weights_are_another_evaluation(tmp_path):
    net = nn.Linear(2, 2)
    before = digest(net)
    assert digest(net) == before
    with torch.no_grad():
        net.bias[0] += 1e-6
    assert digest(net) != before
    assert digest(torch.zeros(4)) != digest(torch.zeros(2, 2)) != digest(torch.zeros(2, 2, dtype=torch.int32))
    net.register_buffer("mean", torch.zeros(1), persistent=False)
    after = digest(net)
    net.mean += 1
    assert digest(net) != after


def test_other_code_is_another_evaluation(run, tmp_path, monkeypatch):
    """Whatever the attacks import, but for what only reads and draws."""
    for_show = {"config", "files", "plots", "evaluation.names", "evaluation.picture", "evaluation.record"}
    code = "import sys, puat_fast.evaluation.evaluate, puat_fast.evaluation.latent; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name.removeprefix("puat_fast.") for name in loaded if name.startswith("puat_fast.")} - for_show
    files = {Path(sys.modules[f"puat_fast.{name}"].__file__) for name in ours} - {Path(evaluation.__file__)}
    sources = run_module._sources()
    assert files <= set(sources) and any(file.name == "bn_silu.py" and "kernels" in file.parts for file in sources)
    measured(run, tmp_path)
    changed = tmp_path / "objectives.py"
    changed.write_text("another loss")
    monkeypatch.setattr(run_module, "_sources", lambda: [*sources, changed])
    assert not measured(run, tmp_path)["kept"]


def test_another_acgan_or_compat_is_another_evaluation(run, tmp_path):
    acgan = small_acgan()
    file = tmp_path / "a.safetensors"
    save_acgan(file, acgan)
    settings: dict[str, Any] = {"attack": "gpgd-0.1", "acgan": file, "n": 4}
    measured(run, tmp_path, **settings)
    assert measured(run, tmp_path, **settings)["kept"]
    for other in ({"compat": "official-v1"}, {"start": "image"}, {"antialias": True}):
        found = measured(run, tmp_path, **settings, **other)
        assert not found["kept"] and found.items() >= other.items()
    with torch.no_grad():
        acgan.D.label.weight[0, 0, 0, 0] += 1
    save_acgan(file, acgan)
    assert not measured(run, tmp_path, **settings)["kept"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_record_is_whole_and_safe(tmp_path):
    told: list[str] = []
    store = Store(tmp_path, tell=told.append)
    store.open("pgd-8", "k" * 64).save({"columns": {"right": torch.ones(3, dtype=torch.bool)}}, complete=True)
    (file,) = tmp_path.iterdir()
    back = store.open("pgd-8", "k" * 64)
    assert back.complete and back.measured and int(back.state["columns"]["right"].sum()) == 3
    assert store.open("pgd-8", "k" * 16 + "other").state is None  # of the same name, by chance
    assert "broken" in told.pop()
    for content in (b"", file.read_bytes()[:200], b"PK\x03\x04 nonsense"):
        file.write_bytes(content)
        assert store.open("pgd-8", "k" * 64).state is None
        assert str(file) in told.pop()


def test_what_a_killed_process_left_is_removed_but_not_what_another_one_writes(tmp_path):
    old, new = tmp_path / ".aa-1.pt.12.tmp", tmp_path / ".aa-1.pt.13.tmp"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    Store(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_writes_are_rare_but_for_those_asked_for(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(record, "perf_counter", lambda: now[0])
    kept, (state,) = Store(tmp_path).open("aa", "k"), ({"n": 1},)
    kept.save(state)
    assert list(tmp_path.iterdir()) == []
    now[0] = record.SAVE_SECONDS
    kept.save(state)
    (file,) = tmp_path.iterdir()
    file.unlink()
    now[0] += 1
    kept.save(state)
    assert not file.exists()
    kept.save(state, now=True)
    assert file.exists()


def test_a_folder_that_cannot_be_written_is_told_and_no_more(run, tmp_path):
    (tmp_path / "file").touch()
    told: list[str] = []
    settings = Options(n=4, device="cpu", out=tmp_path / "file" / "out")
    found = evaluate_run(run, ["clean"], settings, tell=told.append)
    assert found.result["attacks"]["clean"]["n"] == 4
    (line,) = told
    assert line.startswith("nothing is kept of this evaluation") and "Not a directory" in line


def test_a_full_disk_is_told_and_no_more(run, tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "x.pt")

    told: list[str] = []
    monkeypatch.setattr(record.torch, "save", full)
    found = evaluate_run(run, ["clean", "pgd-8"], Options(n=4, device="cpu", out=tmp_path), tell=told.append)
    assert len(found.result["attacks"]) == 2 and len(told) == 1 and "No space left" in told[0]


# -- killed, and interrupted -----------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from pathlib import Path
from puat_fast.evaluation import record
from puat_fast.evaluation.run import Options, evaluate_run
record.SAVE_SECONDS, record.WRITING = 0.0, 1.0
def progress(name, done, total, accuracy):
    if (name, done) == ("pgd-8", 8):
        os.kill(os.getpid(), signal.SIGKILL)
run, out = map(Path, sys.argv[1:])
evaluate_run(run, ["clean", "pgd-8"], Options(n=20, batch_size=4, device="cpu", out=out), progress=progress)
"""


def evaluated(run: Path, out: Path | None, progress: Any = None) -> Any:
    settings = Options(n=20, batch_size=4, device="cpu", out=out)
    return evaluate_run(run, ["clean", "pgd-8"], settings, progress=progress)


def test_killed_and_started_again(run, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILL, run, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen: list[Any] = []
    found = evaluated(run, tmp_path, lambda *args: seen.append(args))
    assert [args[:2] for args in seen] == [("pgd-8", done) for done in (8, 12, 16, 20)]  # clean is there already
    whole = evaluated(run, None)
    assert found.verdicts.keys() == whole.verdicts.keys()
    assert all((found.verdicts[key] == whole.verdicts[key]).all() for key in whole.verdicts)
    for key in ("x_adv", "after", "index"):
        assert torch.equal(found.examples["pgd-8"][key], whole.examples["pgd-8"][key])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_saves_and_says_how_to_go_on(run, tmp_path, number, capfd):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def stop(name: str, done: int, total: int, accuracy: float) -> None:
        if (name, done) == ("pgd-8", 8):
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="and saved; the same command, without --fresh, goes on"):
        evaluated(run, tmp_path, stop)
    assert capfd.readouterr().err == "puat-fast: stopping once this batch is saved; a second time, at once\n"
    seen: list[Any] = []
    evaluated(run, tmp_path, lambda *args: seen.append(args[:2]))
    assert seen[0] == ("pgd-8", 12)  # the batch under way when the signal came was finished
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        evaluated(run, None, stop)
