"""What a run leaves beside its checkpoints: its losses, and its best models."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.distill import _diverges
from jobs.record import LOSSES_FILE, RECENT, BestModels, Growth, LossFile, read_losses


def line(step: int) -> dict[str, object]:
    return {"step": step, "samples": [4 * step - 4, 4 * step], "total": 0.1 + 0.2 * step}


def test_losses_come_back_digit_for_digit_and_are_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    with LossFile(tmp_path, samples=0) as file:
        for step in range(1, 6):
            file.write(line(step))
        file.sync()
    assert list(read_losses(tmp_path / LOSSES_FILE)) == [line(step) for step in range(1, 6)]
    with LossFile(tmp_path, samples=12) as file:
        file.write(line(4))
    assert list(read_losses(tmp_path / LOSSES_FILE)) == [line(step) for step in range(1, 5)]


def test_a_line_that_was_cut_off_with_the_machine_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / LOSSES_FILE
    with LossFile(tmp_path, samples=0) as file:
        file.write(line(1))
    for damage in (b'{"step": 2, "samp', b'{"step": 2, "samples": [4, 8]}', b"\0\0\0\n"):
        whole = path.read_bytes()
        path.write_bytes(whole + damage)
        assert list(read_losses(path)) == [line(1)]
        with LossFile(tmp_path, samples=8):
            pass
        assert path.read_bytes() == whole


def test_without_the_runs_folder_nothing_is_written(tmp_path: Path) -> None:
    with LossFile(tmp_path / "elsewhere", samples=0) as file:
        file.write(line(1))
        file.sync()
    assert not list(tmp_path.iterdir())
    assert list(read_losses(tmp_path / "elsewhere" / LOSSES_FILE)) == []
    assert not BestModels(tmp_path / "elsewhere").wants(30.0, keep=1)


def test_growth_is_of_the_mean_of_one_term_over_its_lowest() -> None:
    growth = Growth(limit=2.0)
    values = [1.0] * RECENT + [0.5] * RECENT + [5.0]  # a single outlier: the mean is 0.59
    for step, value in enumerate(values, 1):
        assert growth.add(step, {"pixel_l1": value, "any_step": 1.0}) is None
    found = []
    for step in range(len(values) + 1, len(values) + 2 * RECENT):
        found.append(growth.add(step, {"pixel_l1": 1.5, "any_step": 1.0}))
    first = next(i for i, grown in enumerate(found) if grown)
    assert found[first] == ("pixel_l1", 2 * RECENT)
    # 0.5 + (4.5 + k) / 50 exceeds 1 after k = 21 more of 1.5.
    assert first + 1 == 21


def test_growth_is_not_judged_unless_asked_for() -> None:
    growth = Growth(limit=None)
    assert not any(growth.add(step, {"pixel_l1": 10.0**step}) for step in range(200))


def test_the_best_models_are_kept_and_listed(tmp_path: Path) -> None:
    best = BestModels(tmp_path)

    def offer(step: int, psnr_y: float) -> None:
        if best.wants(psnr_y, keep=2):
            with best.place(step, psnr_y, keep=2) as folder:
                folder.mkdir()
                (folder / "model.json").write_text(str(step))

    for step, psnr_y in [(10, 27.0), (20, 29.0), (30, 28.0), (40, 26.0), (50, 28.0)]:
        offer(step, psnr_y)
    assert [entry["step"] for entry in best.entries()] == [20, 30]
    assert {path.name for path in tmp_path.glob("best/step-*")} == {"step-000020", "step-000030"}
    # The same step again, after a resume: once in the list.
    offer(30, 28.5)
    assert [(entry["step"], entry["psnr_y"]) for entry in best.entries()] == [
        (20, 29.0),
        (30, 28.5),
    ]
    assert not best.wants(40.0, keep=0)


def test_a_model_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    best = BestModels(tmp_path)
    with pytest.raises(OSError), best.place(10, 27.0, keep=1) as folder:
        folder.mkdir()
        raise OSError("disk full")
    assert best.entries() == []
    with best.place(10, 27.0, keep=1) as folder:
        folder.mkdir()
    assert best.entries() == [{"step": 10, "psnr_y": 27.0, "model": "step-000010"}]
    assert [path.name for path in tmp_path.glob("best/step-*")] == ["step-000010"]


def test_a_diverging_run_names_the_newest_model_from_before(tmp_path: Path) -> None:
    for step in (40, 60):
        folder = tmp_path / "train" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        (folder / "teasr.json").write_text(f'{{"steps": {step}}}')
    with BestModels(tmp_path).place(20, 27.0, keep=1) as folder:
        folder.mkdir()
    told = {
        step: str(_diverges(tmp_path, "the pixel_l1 term has grown", step)) for step in (50, 30)
    }
    assert f"from step 40: init={tmp_path}/train/checkpoint_40/model" in told[50]
    assert f"from step 20: init={tmp_path}/best/step-000020" in told[30]
    assert "from other weights" in str(_diverges(tmp_path, "the pixel_l1 term has grown", 10))
