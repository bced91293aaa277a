"""The synthetic scenes, the batches and the training of the small Keye."""

import random
import re
import shlex

import pytest
import torch

import keye_kernels as kk
from examples.train_small import batches, checkpoint, evaluate, train, world

OBJECT = (
    r"a (large|small) (red|green|blue|yellow|purple|orange|white|black) (circle|square|triangle|star|cross|ring) "
    r"at (top|middle|bottom) (left|center|right)"
)
TINY = shlex.split("--steps 4 --decay 1 --warmup 2 --scenes 2 --crowds 3 --perception 1 --save-every 2 --no-worker")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[kk.KeyeProcessor, dict]:
    folder = tmp_path_factory.mktemp("processor")
    config = checkpoint.write_processor(folder)
    return kk.KeyeProcessor.from_pretrained(folder), config


def run(folder, *options: str) -> train.Run:
    trained = train.Run(train.parse(["--out", str(folder), *TINY, *options]))
    trained.train()
    return trained


def weights(trained: train.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.training_model.named_parameters()}


def test_scenes_follow_the_rules():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        width, height = scene.image.size
        assert 84 <= width <= 224 and 84 <= height <= 224
        assert (width, height) not in world.HELD_OUT_SIZES
        assert 1 <= len(scene.objects) <= 3
        cells = []
        for obj in scene.objects:
            low, high = {"large": (0.12, 0.145), "small": (0.065, 0.085)}[obj.size]
            assert low <= obj.radius <= high
            column, row = int(obj.x * 3), int(obj.y * 3)
            assert abs(obj.x - (column + 0.5) / 3) <= 0.05 and abs(obj.y - (row + 0.5) / 3) <= 0.05
            cells.append((row, column))
        assert cells == sorted(set(cells))


def test_objects_and_background_have_the_expected_colors():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        # The center of a cell without an object shows the background
        empty = next(
            c
            for c in range(9)
            if all(abs(t.x * 3 - c % 3 - 0.5) > 0.6 or abs(t.y * 3 - c // 3 - 0.5) > 0.6 for t in scene.objects)
        )
        width, height = scene.image.size
        pixel = scene.image.getpixel((int((empty % 3 + 0.5) / 3 * width), int((empty // 3 + 0.5) / 3 * height)))
        assert all(90 <= channel <= 170 for channel in pixel)
        for obj in scene.objects:
            pixel = scene.image.getpixel((int(obj.x * width), int(obj.y * height)))
            wanted = world.COLOURS[obj.colour]
            near = all(abs(channel - value) <= 12 for channel, value in zip(pixel, wanted, strict=True))
            assert near == (obj.shape != "ring"), (obj, pixel)


def test_questions_and_answers_match_the_scene():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        (what, description), (count, number), *others = scene.questions()
        assert what == "what is in the picture?" and count == "how many objects are there?"
        objects = [re.fullmatch(OBJECT, part).groups() for part in description.split(" and ")]
        assert number == ("one", "two", "three")[len(objects) - 1]
        rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
        places = [(rows.index(row), columns.index(column)) for *_, row, column in objects]
        assert places == sorted(places)
        expected = set()
        for _, colour, shape, row, column in objects:
            if [t[2] for t in objects].count(shape) == 1:
                expected.add((f"what colour is the {shape}?", colour))
            if [t[1:3] for t in objects].count((colour, shape)) == 1:
                expected.add((f"where is the {colour} {shape}?", f"{row} {column}"))
        assert set(others) == expected and len(others) == len(expected)


def test_crowded_scene_has_no_description_and_no_count():
    crowd = world.random_crowd(random.Random(0))
    assert len(crowd.objects) > 3 and crowd.questions()
    assert not {world.WHAT, world.COUNT} & {question for question, _ in crowd.questions()}


def test_question_about_one_object_predicts_the_answer_at_its_end(small):
    processor, config = small
    tokenizer = processor.tokenizer
    data = batches.Batches(processor, kk.KeyeConfig.from_dict(config), batches.Recipe())
    for question, answer in (("what colour is the star?", "red"), ("where is the red star?", "top left")):
        tokens, labels = data._sequence("image", 16, question, answer, random.Random(0))
        answered = [
            (tokenizer.decode([token]), tokenizer.decode([label]))
            for token, label in zip(tokens.tolist(), labels.tolist(), strict=True)
            if label >= 0
        ]
        at_question = list(zip((" star", "?"), answer.replace(" ", "| ").split("|"), strict=False))
        assert answered[: len(at_question)] == at_question
        assert "".join(text for _, text in answered[len(at_question) :]) == answer + "<|im_end|>"
    _, labels = data._sequence("image", 16, world.COUNT, "two", random.Random(0))
    assert int((labels >= 0).sum()) == 2


def test_clip_moves_along_its_main_axis_by_at_least_a_third_of_the_frame():
    for seed in range(150):
        clip = world.random_clip(random.Random(seed))
        width, height = clip.frames[0].size
        assert 4 <= len(clip.frames) == len(clip.objects) <= 8
        first, last = clip.objects[0], clip.objects[-1]
        dx, dy = last.x - first.x, last.y - first.y
        assert max(abs(dx), abs(dy)) >= 1 / 3 - 1e-9
        for right, down in ((dx, dy), (dx * width, dy * height)):
            axis = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
            assert axis == clip.direction
        for frame, obj in zip(clip.frames, clip.objects, strict=True):
            assert 0 <= obj.x <= 1 and 0 <= obj.y <= 1 and frame.size == (width, height)


def test_batch_depends_only_on_seed_and_index(small):
    processor, config = small
    config = kk.KeyeConfig.from_dict(config)
    first = batches.Batches(processor, config, batches.Recipe(0, 1, 3, 2))
    first[0]
    again = batches.Batches(processor, config, batches.Recipe(0, 1, 3, 2))[1]
    for name, tensor in first[1]._asdict().items():
        torch.testing.assert_close(tensor, getattr(again, name), rtol=0, atol=0, msg=name)
    other = batches.Batches(processor, config, batches.Recipe(1, 1, 3, 2))[1]
    assert not torch.equal(first[1].pixel_values[:36], other.pixel_values[:36])


def test_packed_batch_has_the_loss_of_single_prompts(small):
    """The loss of packed sequences against `Keye.forward` on single prompts."""
    processor, config = small
    model = checkpoint.new_model(config, 0)
    training_model = train.TrainingModel(model)
    data = batches.Batches(processor, model.config, batches.Recipe(0, 1, 3, 2))
    batch = data[3]
    loss, _, _ = training_model(batch)
    total, weight, backwards = 0.0, 0.0, 0
    ends = batch.grid_thw.prod(1).cumsum(0).tolist()
    pixels_by_end = dict(zip(ends, batch.pixel_values.tensor_split(ends[:-1]), strict=True))
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        inside = (batch.placeholders >= start) & (batch.placeholders < end)
        features = batch.feature_index[inside]
        last = 4 * (int(features.max()) + 1)
        ids = batch.input_ids[None, start:end]
        video = (ids == model.config.video_token_id).any()
        grid = batch.grid_thw[ends.index(last)][None]
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        pixels = pixels_by_end[last]
        if features[0] > features[-1]:
            pixels, backwards = pixels.unflatten(0, (grid[0, 0], -1)).flip(0).flatten(0, 1), backwards + 1
        inputs = dict(zip(names, (pixels, grid), strict=True))
        output = model(ids, position_ids=batch.position_ids[:, None, start:end], **inputs)
        chosen = (batch.targets >= start) & (batch.targets < end)
        logits = output.logits[0, batch.targets[chosen] - start]
        sequence_loss = torch.nn.functional.cross_entropy(logits, batch.labels[chosen], reduction="sum").item()
        loss_weight = len(logits) ** -0.5 * (3 if video else 1)
        total, weight = total + loss_weight * sequence_loss, weight + loss_weight * len(logits)
        if not video:
            positions = model.get_rope_index(ids, image_grid_thw=grid)[0][:, 0]
            torch.testing.assert_close(batch.position_ids[:, start:end], positions, rtol=0, atol=0)
    assert backwards == 1
    torch.testing.assert_close(loss.item(), total / weight, rtol=1e-5, atol=1e-5)


def test_equal_seeds_give_equal_weights_with_and_without_a_worker(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b", "--worker")
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    other = run(tmp_path / "c", "--seed", "1")
    assert not torch.equal(weights(first)["model.lm_head.weight"], weights(other)["model.lm_head.weight"])


def test_interrupted_and_resumed_run_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    stopped = train.Run(train.parse(["--out", str(tmp_path / "parts"), *TINY]))
    save = train.Run.save

    def save_and_stop(self: train.Run) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    monkeypatch.setattr(train.Run, "save", save)
    assert stopped.step == 2
    resumed = run(tmp_path / "parts")
    assert resumed.step == 4
    torch.testing.assert_close(resumed.history, whole.history, rtol=0, atol=0, equal_nan=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    assert (tmp_path / "parts" / "loss.png").is_file()


def test_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trained = run(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        trained.save()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert kk.Keye.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert train.Run(train.parse(["--out", str(tmp_path), *TINY])).step == 4


def test_resuming_with_other_settings_is_an_error(tmp_path, capsys):
    run(tmp_path)
    assert train.main(["--out", str(tmp_path), *TINY, "--lr", "0.5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_trained_checkpoint_has_the_layout_of_keye(tmp_path):
    run(tmp_path)
    model, processor = kk.Keye.from_pretrained(tmp_path), kk.KeyeProcessor.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.config.head_dim == 128 and model.config.vision_config.head_dim == 72
    assert model.config.mrope_section == (16, 24, 24) and model.config.edition == "preview"
    text = "naïve 你好 🎉\t\n\x00 red"
    assert processor.decode(processor.tokenizer.encode(text)) == text


def test_invalid_options_give_a_one_line_error(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("precious")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.pt").write_bytes(b"junk")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "file"),
        (["--out", str(other)], "contains files of something else"),
        (["--out", str(broken), *TINY], "is not a saved run"),
        (["--out", str(tmp_path / "new"), "--steps", "0"], "--steps must be at least 1"),
        (["--out", str(tmp_path / "new"), "--save-every", "0"], "--save-every must be at least 1"),
    ):
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    for arguments, message in (([str(tmp_path / "nowhere")], "nowhere"), (["--scenes", "0"], "--scenes")):
        assert evaluate.main(arguments) == 2
        assert message in capsys.readouterr().err
