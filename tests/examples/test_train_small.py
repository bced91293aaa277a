"""The small Keye's world and its trainer, at the smallest scale."""

import random
import re

import pytest
import torch

import keye_kernels as kk
from examples.train_small import batches, checkpoint, evaluate, train, world

THING = (
    r"a (large|small) (red|green|blue|yellow|purple|orange|white|black) (circle|square|triangle|star|cross|ring) "
    r"at (top|middle|bottom) (left|center|right)"
)
TINY = [
    "--steps",
    "4",
    "--decay",
    "1",
    "--warmup",
    "2",
    "--scenes",
    "2",
    "--crowds",
    "3",
    "--perception",
    "1",
    "--save-every",
    "2",
    "--no-worker",
]


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
    return {name: p.detach().clone() for name, p in trained.trainee.named_parameters()}


def test_scenes_follow_the_worlds_rules():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        width, height = scene.image.size
        assert 84 <= width <= 224 and 84 <= height <= 224
        assert (width, height) not in world.HELD_OUT_SIZES
        assert 1 <= len(scene.things) <= 3
        cells = []
        for thing in scene.things:
            low, high = {"large": (0.12, 0.145), "small": (0.065, 0.085)}[thing.size]
            assert low <= thing.radius <= high
            column, row = int(thing.x * 3), int(thing.y * 3)
            assert abs(thing.x - (column + 0.5) / 3) <= 0.05 and abs(thing.y - (row + 0.5) / 3) <= 0.05
            cells.append((row, column))
        assert cells == sorted(set(cells))


def test_colours_are_those_of_the_world():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        # The corner of a cell without an object shows the background
        empty = next(
            c
            for c in range(9)
            if all(abs(t.x * 3 - c % 3 - 0.5) > 0.6 or abs(t.y * 3 - c // 3 - 0.5) > 0.6 for t in scene.things)
        )
        width, height = scene.image.size
        pixel = scene.image.getpixel((int((empty % 3 + 0.5) / 3 * width), int((empty // 3 + 0.5) / 3 * height)))
        assert all(90 <= channel <= 170 for channel in pixel)
        for thing in scene.things:
            pixel = scene.image.getpixel((int(thing.x * width), int(thing.y * height)))
            wanted = world.COLOURS[thing.colour]
            near = all(abs(channel - value) <= 12 for channel, value in zip(pixel, wanted, strict=True))
            assert near == (thing.shape != "ring"), (thing, pixel)


def test_questions_and_answers_are_those_of_the_world():
    for seed in range(150):
        scene = world.random_scene(random.Random(seed))
        (what, description), (count, number), *others = scene.questions()
        assert what == "what is in the picture?" and count == "how many objects are there?"
        things = [re.fullmatch(THING, part).groups() for part in description.split(" and ")]
        assert number == ("one", "two", "three")[len(things) - 1]
        rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
        places = [(rows.index(row), columns.index(column)) for *_, row, column in things]
        assert places == sorted(places)
        expected = set()
        for _, colour, shape, row, column in things:
            if [t[2] for t in things].count(shape) == 1:
                expected.add((f"what colour is the {shape}?", colour))
            if [t[1:3] for t in things].count((colour, shape)) == 1:
                expected.add((f"where is the {colour} {shape}?", f"{row} {column}"))
        assert set(others) == expected and len(others) == len(expected)


def test_a_crowded_picture_is_neither_described_nor_counted():
    crowd = world.random_crowd(random.Random(0))
    assert len(crowd.things) > 3 and crowd.questions()
    assert not {world.WHAT, world.COUNT} & {question for question, _ in crowd.questions()}


def test_a_question_that_names_an_object_is_answered_where_it_ends(small):
    processor, config = small
    tokenizer = processor.tokenizer
    data = batches.Batches(processor, kk.KeyeConfig.from_dict(config), batches.Recipe())
    for question, answer in (("what colour is the star?", "red"), ("where is the red star?", "top left")):
        tokens, labels = data._row("image", 16, question, answer, random.Random(0))
        answered = [
            (tokenizer.decode([token]), tokenizer.decode([label]))
            for token, label in zip(tokens.tolist(), labels.tolist(), strict=True)
            if label >= 0
        ]
        ahead = list(zip((" star", "?"), answer.replace(" ", "| ").split("|"), strict=False))
        assert answered[: len(ahead)] == ahead
        assert "".join(text for _, text in answered[len(ahead) :]) == answer + "<|im_end|>"
    _, labels = data._row("image", 16, world.COUNT, "two", random.Random(0))
    assert int((labels >= 0).sum()) == 2


def test_clips_move_along_their_main_axis_by_a_third():
    for seed in range(150):
        clip = world.random_clip(random.Random(seed))
        width, height = clip.frames[0].size
        assert 4 <= len(clip.frames) == len(clip.things) <= 8
        first, last = clip.things[0], clip.things[-1]
        dx, dy = last.x - first.x, last.y - first.y
        assert max(abs(dx), abs(dy)) >= 1 / 3 - 1e-9
        for right, down in ((dx, dy), (dx * width, dy * height)):
            axis = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
            assert axis == clip.direction
        for frame, thing in zip(clip.frames, clip.things, strict=True):
            assert 0 <= thing.x <= 1 and 0 <= thing.y <= 1 and frame.size == (width, height)


def test_a_batch_depends_on_seed_and_number_alone(small):
    processor, config = small
    config = kk.KeyeConfig.from_dict(config)
    first = batches.Batches(processor, config, batches.Recipe(0, 1, 3, 2))
    first[0]
    again = batches.Batches(processor, config, batches.Recipe(0, 1, 3, 2))[1]
    for name, tensor in first[1]._asdict().items():
        torch.testing.assert_close(tensor, getattr(again, name), rtol=0, atol=0, msg=name)
    other = batches.Batches(processor, config, batches.Recipe(1, 1, 3, 2))[1]
    assert not torch.equal(first[1].pixel_values[:36], other.pixel_values[:36])


def test_a_packed_batch_has_the_loss_of_the_model_itself(small):
    """The trainer's way through the model (packed rows) against `Keye.forward` on single prompts."""
    processor, config = small
    model = checkpoint.new_model(config, 0)
    trainee = train.Trainee(model)
    data = batches.Batches(processor, model.config, batches.Recipe(0, 1, 3, 2))
    batch = data[3]
    loss, _, _ = trainee(batch)
    total, weight, backwards = 0.0, 0.0, 0
    ends = batch.grid_thw.prod(1).cumsum(0).tolist()
    pictures = dict(zip(ends, batch.pixel_values.tensor_split(ends[:-1]), strict=True))
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        inside = (batch.placeholders >= start) & (batch.placeholders < end)
        features = batch.feature_index[inside]
        last = 4 * (int(features.max()) + 1)
        ids = batch.input_ids[None, start:end]
        video = (ids == model.config.video_token_id).any()
        grid = batch.grid_thw[ends.index(last)][None]
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        pixels = pictures[last]
        if features[0] > features[-1]:
            pixels, backwards = pixels.unflatten(0, (grid[0, 0], -1)).flip(0).flatten(0, 1), backwards + 1
        inputs = dict(zip(names, (pixels, grid), strict=True))
        output = model(ids, position_ids=batch.position_ids[:, None, start:end], **inputs)
        chosen = (batch.targets >= start) & (batch.targets < end)
        logits = output.logits[0, batch.targets[chosen] - start]
        loss_of_row = torch.nn.functional.cross_entropy(logits, batch.labels[chosen], reduction="sum").item()
        share = len(logits) ** -0.5 * (3 if video else 1)
        total, weight = total + share * loss_of_row, weight + share * len(logits)
        if not video:
            positions = model.get_rope_index(ids, image_grid_thw=grid)[0][:, 0]
            torch.testing.assert_close(batch.position_ids[:, start:end], positions, rtol=0, atol=0)
    assert backwards == 1
    torch.testing.assert_close(loss.item(), total / weight, rtol=1e-5, atol=1e-5)


def test_one_seed_gives_the_same_weights_with_a_worker_process_too(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b", "--worker")
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    other = run(tmp_path / "c", "--seed", "1")
    assert not torch.equal(weights(first)["model.lm_head.weight"], weights(other)["model.lm_head.weight"])


def test_stopping_and_going_on_equals_not_stopping(tmp_path, monkeypatch):
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


def test_a_save_that_breaks_off_leaves_the_last_one(tmp_path, monkeypatch):
    trained = run(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def break_off(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        trained.save()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert kk.Keye.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert train.Run(train.parse(["--out", str(tmp_path), *TINY])).step == 4


def test_other_settings_in_a_folder_with_a_run_are_refused(tmp_path, capsys):
    run(tmp_path)
    assert train.main(["--out", str(tmp_path), *TINY, "--lr", "0.5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_the_trained_checkpoint_is_keyes_layout(tmp_path):
    run(tmp_path)
    model, processor = kk.Keye.from_pretrained(tmp_path), kk.KeyeProcessor.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.config.head_dim == 128 and model.config.vision_config.head_dim == 72
    assert model.config.mrope_section == (16, 24, 24) and model.config.edition == "preview"
    text = "naïve 你好 🎉\t\n\x00 red"
    assert processor.decode(processor.tokenizer.encode(text)) == text


def test_bad_input_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("precious")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.pt").write_bytes(b"junk")
    for arguments, said in (
        (["--out", str(tmp_path / "file")], "file"),
        (["--out", str(other)], "holds something else"),
        (["--out", str(broken), *TINY], "is not a saved run"),
        (["--out", str(tmp_path / "new"), "--steps", "0"], "--steps must be at least 1"),
        (["--out", str(tmp_path / "new"), "--save-every", "0"], "--save-every must be at least 1"),
    ):
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, error
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    for arguments, said in (([str(tmp_path / "nowhere")], "nowhere"), (["--scenes", "0"], "--scenes")):
        assert evaluate.main(arguments) == 2
        assert said in capsys.readouterr().err
