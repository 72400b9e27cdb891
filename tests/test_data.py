"""data.py: flags, files, images, the Waterbirds layout, composites, drawn scenes, pages."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
from data import Complaint

ROOT = Path(data.__file__).parent


def load(spec, masks="", confounder=1.0, seed=0, **more):
    """load_data; digits:STRENGTH:CLASS[:DIR] stands for its flags."""
    name, _, where = spec.partition(":")
    if name == "digits" and ":" in where:
        strength, spurious, *root = where.split(":", 2)
        spec, more = ":".join([name, *root]), dict(more, strength=float(strength), spurious=spurious)
    return data.load_data(spec, masks=masks, confounder=confounder, seed=seed, **more)


def pictures(root, flag):
    return [Path(root, *parts) for parts in data.scan(root, flag)]


def complaint(*words):
    """Expects a Complaint of one line that contains each of the words."""
    return pytest.raises(
        Complaint, match="(?s)^" + "".join(f"(?=.*{re.escape(str(w))})" for w in words) + r"[^\n]*$"
    )


def digest(image):
    return hashlib.sha256(image.mode.encode() + image.tobytes()).hexdigest()


def cutout(path, size=60, colour=(200, 40, 40)):
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((10, 5, size - 12, size - 5), fill=(*colour, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def photo(path, seed=0, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), "uint8")).save(path)
    return str(path)


# --- flags


def script(**more):
    return dict(name="a", number=3, rate=0.1, switch=False, Constant=1, function=len, **more)


def test_flags_split_at_the_first_equals_sign():
    assert data.flags(script(), ["--name=x=y=z"])["name"] == "x=y=z"


def test_flags_change_the_script_in_place_and_return_every_flag():
    here = script()
    assert data.flags(here, ["--number=7"]) == dict(name="a", number=7, rate=0.1, switch=False)
    assert here["number"] == 7 and here["Constant"] == 1 and here["function"] is len


def test_flags_take_an_int_for_a_float():
    value = data.flags(script(), ["--rate=2"])["rate"]
    assert value == 2.0 and type(value) is float


@pytest.mark.parametrize(
    "word, value",
    [
        ("--switch", True),
        ("--switch=true", True),
        ("--switch=True", True),
        ("--switch=1", True),
        ("--switch=false", False),
        ("--switch=False", False),
        ("--switch=0", False),
    ],
)
def test_flags_spellings_of_a_bool(word, value):
    assert data.flags(script(), [word])["switch"] is value


def test_flags_last_one_counts():
    assert data.flags(script(), ["--number=1", "--number=2"])["number"] == 2


@pytest.mark.parametrize(
    "word, words",
    [
        ("--nmber=3", ("--nmber", "no such flag", "number")),
        ("--zzzz=3", ("--zzzz", "name", "number", "rate", "switch")),
        ("--Constant=2", ("--Constant",)),
        ("--function=2", ("--function",)),
        ("--number=2.5", ("--number", "2.5", "whole number")),
        ("--number", ("--number",)),
        ("--rate=fast", ("--rate", "fast", "a number")),
        ("--rate=nan", ("--rate", "nan")),
        ("--switch=maybe", ("--switch", "maybe", "True or False")),
        ("--name", ("--name=VALUE",)),
        ("word", ("word", "--key=value")),
    ],
)
def test_flags_bad_word_is_named(word, words):
    with complaint(*words):
        data.flags(script(), [word])


def test_flags_help_prints_the_block_and_nothing_after_it(tmp_path, capsys):
    source = '"""What."""\nimport this\n\n# --- I/O ---\nout = "o"  # where to\n# --- end ---\nsecret = 1\n'
    (tmp_path / "s.py").write_text(source)
    with pytest.raises(SystemExit) as stop:
        data.flags(dict(out="o", __file__=str(tmp_path / "s.py"), __doc__="What it does."), ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in shown and 'out = "o"  # where to' in shown
    assert "secret" not in shown and "import this" not in shown


@pytest.mark.parametrize(
    "problem, code",
    [
        (Complaint("x.csv: wrong"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_run_turns_what_the_user_can_mend_into_one_line_and_an_exit_code(problem, code, capsys):
    def main():
        raise problem

    with pytest.raises(SystemExit) as stop:
        data.run(main)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == code and "\n" not in line and ("x.csv" in line or code == 130)


def test_run_leaves_our_own_mistakes_their_traceback():
    with pytest.raises(ZeroDivisionError):
        data.run(lambda: 1 / 0)


def test_rng_depends_on_seed_purpose_and_index_only():
    def draw(*k):
        return data.rng(*k).random()

    assert draw(1, "pose", 3) == draw(1, "pose", 3)
    assert len({draw(1, "pose", 3), draw(2, "pose", 3), draw(1, "view", 3), draw(1, "pose", 4)}) == 4


# --- files


def test_write_makes_the_folder_and_leaves_nothing_beside_the_file(tmp_path):
    data.write(tmp_path / "a/b/c.txt", "grün")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "grün".encode() and os.listdir(tmp_path / "a/b") == [
        "c.txt"
    ]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_on_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, call):
    data.write(tmp_path / "c.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, call, full)
    with complaint(tmp_path / "c.txt", "No space left", "free some space"):
        data.write(tmp_path / "c.txt", "new")
    assert (tmp_path / "c.txt").read_text() == "old" and os.listdir(tmp_path) == ["c.txt"]


def test_write_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.write(tmp_path / "c.txt", "new")
    assert os.listdir(tmp_path) == []


def test_write_below_a_file_is_a_complaint(tmp_path):
    (tmp_path / "file").write_text("")
    with complaint(tmp_path / "file" / "c.txt", "cannot be written"):
        data.write(tmp_path / "file" / "c.txt", "x")


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        data.write_json(tmp_path / "a.json", dict(x=float("nan")))
    assert not os.listdir(tmp_path)


def test_pictures_are_sorted_found_below_and_hidden_ones_passed_over(tmp_path):
    for name in ("b.JPG", "a/z.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert data.scan(tmp_path, "backgrounds") == [("a", "z.png"), ("b.JPG",)]


@pytest.mark.parametrize(
    "where, words", [("nowhere", "no such folder"), ("file", "not a folder"), ("empty", "no images")]
)
def test_pictures_complains_about_the_flag_and_folder(tmp_path, where, words):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with complaint("--backgrounds", tmp_path / where, words):
        data.scan(tmp_path / where, "backgrounds")


# --- images


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_open_image_truncated_file_is_named(tmp_path, kind, share):
    path = Path(photo(tmp_path / f"a.{kind}"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with complaint(path):
        data.open_image(str(path))


@pytest.mark.parametrize(
    "content, words", [(b"", "empty file"), (b"hello, no picture here", "not a picture")]
)
def test_open_image_empty_or_not_an_image(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    with complaint(tmp_path / "a.jpg", words, "--skip_bad"):
        data.open_image(str(tmp_path / "a.jpg"))


def test_open_image_missing_or_a_folder(tmp_path):
    with complaint(tmp_path / "a.jpg", "no such file"):
        data.open_image(str(tmp_path / "a.jpg"))
    with complaint(tmp_path):
        data.open_image(str(tmp_path))


def test_open_image_1x1(tmp_path):
    with complaint("1x1", tmp_path):
        data.open_image(photo(tmp_path / "a.png", size=(1, 1)))


def test_open_image_decompression_bomb(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with complaint(path):
        data.open_image(path)


def save(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return data.open_image(str(tmp_path / name))


def test_open_image_cmyk(tmp_path):
    image = save(tmp_path, Image.new("RGB", (20, 20), (250, 20, 30)).convert("CMYK"), "a.jpg", quality=95)
    assert image.mode == "RGB" and np.abs(np.asarray(image).mean((0, 1)) - (250, 20, 30)).max() < 12


def test_open_image_16_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(20, 0)
    image = save(tmp_path, Image.fromarray(ramp))
    assert image.mode == "RGB" and np.abs(np.asarray(image)[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_open_image_of_floats_up_to_one(tmp_path):
    image = save(
        tmp_path, Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(20, 0)), "a.tiff"
    )
    assert np.abs(np.asarray(image)[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_mask_that_is_not_white(tmp_path):
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    with complaint("m.png", "largest value is 1", "255"):
        data.open_mask(tmp_path / "m.png")
    Image.fromarray(255 * mask).save(tmp_path / "m.png")
    assert data.open_mask(tmp_path / "m.png").getextrema() == (0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_open_image_other_modes_become_rgb(tmp_path, mode):
    image = save(tmp_path, Image.new("RGB", (20, 20), "white").convert(mode))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def test_open_image_palette_with_transparency_keeps_it(tmp_path):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.paste(1, (10, 0, 20, 20))
    opened = save(tmp_path, image, transparency=0)
    assert (
        opened.mode == "RGBA"
        and opened.getpixel((2, 2))[3] == 0
        and opened.getpixel((15, 2)) == (0, 0, 255, 255)
    )
    assert data.opaque(opened).getpixel((2, 2)) == (255, 255, 255)


def test_open_image_animation_gives_its_first_frame(tmp_path):
    image = save(
        tmp_path,
        Image.new("RGB", (20, 20), (255, 0, 0)),
        "a.gif",
        save_all=True,
        append_images=[Image.new("RGB", (20, 20), (0, 0, 255))],
    )
    assert data.opaque(image).getpixel((5, 5)) == (255, 0, 0)


def test_open_image_is_turned_as_exif_says(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's top is at the right: turn clockwise
    turned = save(tmp_path, image, "a.jpg", exif=exif)
    assert turned.size == (20, 40) and turned.getpixel((10, 5))[0] < 60 and turned.getpixel((10, 35))[0] > 200


def test_open_image_damaged_exif_does_not_crash(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg", exif=b"Exif\0\0XXnotatiffheader")
    try:
        assert data.open_image(str(tmp_path / "a.jpg")).size == (20, 20)
    except Complaint as problem:
        assert str(tmp_path / "a.jpg") in str(problem)


# --- the Waterbirds layout

COLUMNS = "img_id,img_filename,y,split,place,place_filename".split(",")


def table(y=2, places=2, splits=3):
    """One row for each class, place and split."""
    return [
        [k, f"s/{k}.jpg", *map(str, (k % y, k // (y * places), k // y % places)), "x"]
        for k in range(y * places * splits)
    ]


def birds(root, rows=None, columns=COLUMNS, encoding="utf-8"):
    root.mkdir(exist_ok=True)
    with open(root / "metadata.csv", "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *(rows if rows is not None else table())])
    for k in range(40):
        photo(root / f"s/{k}.jpg", k, (16, 12)) if not (root / f"s/{k}.jpg").exists() else None
    return f"waterbirds:{root}"


def test_waterbirds_reads_labels_places_and_splits_in_order(tmp_path):
    samples = load(birds(tmp_path))
    assert (
        samples.y.tolist() == [0, 1] * 6
        and samples.place.tolist() == [0, 0, 1, 1] * 3
        and samples.split.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    assert samples.group().tolist() == [0, 2, 1, 3] * 3 and samples.counts(0).tolist() == [1, 1, 1, 1]
    assert samples.items[5].image().tobytes() == data.open_image(str(tmp_path / "s/5.jpg")).tobytes()


def test_waterbirds_any_number_of_classes_and_places(tmp_path):
    samples = load(birds(tmp_path, table(4, 3)))
    assert (len(samples.classes), len(samples.places)) == (4, 3) and samples.counts(2).tolist() == [1] * 12


def test_waterbirds_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert len(load(birds(tmp_path, encoding="utf-8-sig")).items) == 12


@pytest.mark.parametrize("column", COLUMNS)
def test_waterbirds_missing_column_is_named(tmp_path, column):
    k = COLUMNS.index(column)

    def drop(r):
        return r[:k] + r[k + 1 :]

    with complaint("metadata.csv", f"no column '{column}'", "found:", ",".join(COLUMNS)):
        load(birds(tmp_path, [drop(r) for r in table()], drop(COLUMNS)))


def test_waterbirds_extra_column_is_noted(tmp_path):
    samples = load(birds(tmp_path, [[*r, "7"] for r in table()], [*COLUMNS, "weather"]))
    assert any("'weather'" in note for note in samples.notes)


@pytest.mark.parametrize("name", ["../secret.jpg", "s/../../secret.jpg", "/etc/passwd", ""])
def test_waterbirds_paths_out_of_the_folder_are_refused(tmp_path, name):
    rows = table()
    rows[3][1] = name
    with complaint("metadata.csv:5", "expected a path inside"):
        load(birds(tmp_path / "in", rows))


@pytest.mark.parametrize(
    "column, value",
    [
        ("y", "1.0"),
        ("y", "bird"),
        ("y", ""),
        ("place", "-1"),
        ("split", "3"),
        ("split", "train"),
        ("y", "9" * 30),
    ],
)
def test_waterbirds_numbers_that_are_none_name_the_line(tmp_path, column, value):
    rows = table()
    rows[2][COLUMNS.index(column)] = value
    with complaint("metadata.csv", f"{value}"):
        load(birds(tmp_path, rows))


def test_waterbirds_short_row_names_the_line(tmp_path):
    rows = table()
    rows[2] = rows[2][:2]
    with complaint("metadata.csv:4"):
        load(birds(tmp_path, rows))


def test_waterbirds_split_without_images(tmp_path):
    with complaint("split 1 (val)"):
        load(birds(tmp_path, [r for r in table() if r[3] != "1"]))


def test_waterbirds_class_without_images_in_a_split(tmp_path):
    with complaint("split 2 (test)", "no images of class"):
        load(birds(tmp_path, [r for r in table() if (r[3], r[2]) != ("2", "1")]))


def test_waterbirds_one_class_only(tmp_path):
    with complaint("one class only"):
        load(birds(tmp_path, [r for r in table() if r[2] == "0"]))


def test_waterbirds_place_that_never_occurs_is_none(tmp_path):
    with complaint("no images of place 1"):
        load(birds(tmp_path, [r for r in table(2, 3) if r[4] != "1"]))


def test_waterbirds_duplicate_row_names_both_lines(tmp_path):
    with complaint("metadata.csv:14", "s/3.jpg", "line 5"):
        load(birds(tmp_path, [*table(), table()[3]]))


def test_waterbirds_missing_files_are_left_out_with_one_warning_that_counts_them(tmp_path):
    spec = birds(tmp_path, table(splits=3) + [[k, f"s/{k}.jpg", *r[2:]] for k, r in enumerate(table(), 12)])
    for k in (3, 7):
        (tmp_path / f"s/{k}.jpg").unlink()
    samples = load(spec)
    warnings = [n for n in samples.notes if n.startswith("WARNING")]
    assert (
        len(samples.items) == len(samples.y) == 22
        and len(warnings) == 1
        and "2 of its 24" in warnings[0]
        and "s/3.jpg" in warnings[0]
    )
    assert (
        all(os.path.isfile(p.path) for p in samples.items)
        and samples.items[3].path.endswith("s/4.jpg")
        and samples.y[3] == 0
    )
    for path in (tmp_path / "s").iterdir():
        path.unlink()
    with complaint("24 of its 24 images do not exist"):
        load(spec)


def test_waterbirds_not_utf8(tmp_path):
    with complaint("metadata.csv", "UTF-8"):
        load(birds(tmp_path, [[*r[:5], "grün"] for r in table()], encoding="utf-16"))


@pytest.mark.parametrize("content", ["", ",".join(COLUMNS) + "\n"])
def test_waterbirds_table_without_rows(tmp_path, content):
    birds(tmp_path)
    (tmp_path / "metadata.csv").write_text(content)
    with complaint("metadata.csv"):
        load(f"waterbirds:{tmp_path}")


def test_waterbirds_folder_without_a_table_or_none_at_all(tmp_path):
    with complaint("no metadata.csv"):
        load(f"waterbirds:{tmp_path}")
    with complaint("no such folder", tmp_path / "x"):
        load(f"waterbirds:{tmp_path / 'x'}")


@pytest.mark.parametrize("spec", ["waterbird:x", "waterbirds", "scenes:x", ""])
def test_load_data_lists_what_there_is(spec):
    with complaint("--data"):
        load(spec)


def test_check_says_which_groups_the_training_set_lacks(tmp_path):
    rows = [r for r in table() if r[3] != "0" or r[2] == r[4]]
    assert any("100 % correlated" in n and "0 on 1" in n for n in load(birds(tmp_path, rows)).notes)


def test_samples_keep_picks_everything_alike(tmp_path):
    samples = load(birds(tmp_path))
    kept = samples.keep(torch.tensor([7, 2]))
    assert (
        kept.items == [samples.items[7], samples.items[2]]
        and kept.y.tolist() == [1, 0]
        and kept.group().tolist() == [3, 1]
    )
    assert kept.captions == [samples.captions[7], samples.captions[2]] and len(kept.cut) == 2


# --- data sets on disk: every layout, its published counts, and what is wrong with it


def touch(root, *names, size=(16, 12)):
    """Tiny pictures."""
    for k, name in enumerate(names):
        photo(root / name, k, size)


def loaded(spec, splits=False, **more):
    return load(spec, splits=splits, **more)


def warnings(samples):
    return [n for n in samples.notes if n.startswith("WARNING")]


def rows(samples):
    """What a model is told of each picture: split, class, place, file name."""
    return [
        (data.SPLITS[s], samples.classes[y] if y >= 0 else None, samples.places[p], Path(i.path).name)
        for s, y, p, i in zip(
            samples.split.tolist(), samples.y.tolist(), samples.place.tolist(), samples.items, strict=False
        )
    ]


def test_folder_split_class_place(tmp_path):
    touch(
        tmp_path,
        *[
            f"{s}/{c}/{p}/{k}.jpg"
            for s in ("train", "valid", "Test")
            for c in ("cat", "a dog")
            for p in ("in", "out")
            for k in range(2)
        ],
    )
    samples = loaded(f"folder:{tmp_path}", splits=True)
    assert (
        samples.classes == ["a dog", "cat"]
        and samples.places == ["in", "out"]
        and samples.official
        and samples.counts(2).tolist() == [2] * 4
    )
    assert rows(samples)[0] == ("test", "a dog", "in", "0.jpg") and samples.prompts == [
        ["a photo of a a dog."],
        ["a photo of a cat."],
    ]


def test_folder_split_class_without_places_or_val(tmp_path):
    touch(
        tmp_path, *[f"{s}/{c}/{k}.png" for s in ("train", "test") for c in ("cat", "dog") for k in range(10)]
    )
    samples = loaded(f"folder:{tmp_path}", splits=True)
    assert [torch.bincount(samples.y[samples.split == s]).tolist() for s in range(3)] == [
        [8, 8],
        [2, 2],
        [10, 10],
    ]
    assert samples.places == ["anywhere"] and any("no val split" in n for n in samples.notes)


def test_folder_train_and_val_only_reads_val_as_test(tmp_path):
    touch(tmp_path, *[f"{s}/{c}/{k}.png" for s in ("train", "val") for c in ("cat", "dog") for k in range(5)])
    samples = loaded(f"folder:{tmp_path}", splits=True)
    assert [int((samples.split == s).sum()) for s in range(3)] == [8, 2, 10] and any(
        "no test split" in n for n in samples.notes
    )


def test_folder_of_classes_gets_splits_by_a_rule_that_another_file_does_not_change_elsewhere(tmp_path):
    touch(tmp_path, *[f"{c}/{k}.jpg" for c in ("cat", "dog") for k in range(10)])
    first = loaded(f"folder:{tmp_path}", splits=True)
    assert not first.official and [int((first.split == s).sum()) for s in range(3)] == [12, 4, 4]
    touch(tmp_path, "dog/new.jpg")
    again = loaded(f"folder:{tmp_path}", splits=True)
    assert rows(again)[:10] == rows(first)[:10]


def test_folder_class_place_and_strays(tmp_path):
    touch(
        tmp_path,
        "cat/in/a.jpg",
        "cat/out/b.jpg",
        "dog/in/deeper/c.jpg",
        "dog/d.jpg",
        "stray.jpg",
        ".hidden/cat/e.jpg",
        "cat/in/.f.jpg",
    )
    samples = loaded(f"folder:{tmp_path}")
    assert [r[1:] for r in rows(samples)] == [
        ("cat", "in", "a.jpg"),
        ("cat", "out", "b.jpg"),
        ("dog", "elsewhere", "d.jpg"),
        ("dog", "in", "c.jpg"),
    ]
    assert len(warnings(samples)) == 2 and "1 images lie outside" in warnings(samples)[0]


def test_folder_splits_are_no_classes_whatever_lies_beside_them(tmp_path):
    touch(
        tmp_path,
        *[f"{s}/{c}/{k}.png" for s in ("train", "test") for c in ("cat", "dog") for k in range(5)],
        "logo.png",
    )
    samples = loaded(f"folder:{tmp_path}")
    assert (
        samples.classes == ["cat", "dog"]
        and samples.official
        and len(samples.y) == 20
        and "1 images lie outside" in warnings(samples)[0]
    )
    touch(tmp_path, "extra/cat/a.png")
    with complaint("test, train are splits", "'extra'"):
        loaded(f"folder:{tmp_path}")
    touch(tmp_path / "vehicles", *[f"{c}/{k}.png" for c in ("train", "bus") for k in range(5)])
    assert loaded(f"folder:{tmp_path}/vehicles").classes == ["bus", "train"]


def test_links(tmp_path):
    touch(tmp_path, *[f"far/{c}/{k}.png" for c in ("cat", "dog") for k in range(5)])
    (tmp_path / "near").mkdir()
    for c in ("cat", "dog"):
        (tmp_path / "near" / c).symlink_to(tmp_path / "far" / c)
    assert len(data.scan(tmp_path / "near")) == 10
    (tmp_path / "far/cat/loop").symlink_to(tmp_path / "far")
    assert len(data.scan(tmp_path / "far")) == len(loaded(f"folder:{tmp_path}/far").y) == 10
    (tmp_path / "far/dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    with complaint("gone.png", "a link to", "nowhere.png"):
        loaded(f"folder:{tmp_path}/far")


def test_folder_unlabelled_needs_names_to_choose_from(tmp_path):
    touch(tmp_path / "images", "a.jpg", "b.jpg")
    with complaint("no class folders", "--classes"):
        loaded(f"folder:{tmp_path}/images")
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    samples = loaded(f"folder:{tmp_path}/images", classes=str(tmp_path / "names.txt"))
    assert samples.y.tolist() == [-1, -1] and samples.labels == ["cat", "dog"] and len(samples.prompts) == 2
    with complaint("no labels"):
        loaded(f"folder:{tmp_path}/images", splits=True, classes=str(tmp_path / "names.txt"))


def test_classes_file_decides_names_and_order_and_may_know_more(tmp_path):
    touch(tmp_path / "d", "Black_Cat/a.jpg", "dog/b.jpg")
    (tmp_path / "names.txt").write_text("dog\nblack cat\nfox\n")
    samples = loaded(f"folder:{tmp_path}/d", classes=str(tmp_path / "names.txt"))
    assert samples.classes == ["dog", "black cat", "fox"] and samples.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    "names, words",
    [
        ("dog\nfox\n", ("Black_Cat", "--classes")),
        ("dog\nDog\n", ("two classes with the same name", ":2")),
        ("\n", ("empty file",)),
    ],
)
def test_classes_file_that_does_not_fit(tmp_path, names, words):
    touch(tmp_path / "d", "Black_Cat/a.jpg", "dog/b.jpg")
    (tmp_path / "names.txt").write_text(names)
    with complaint(*words):
        loaded(f"folder:{tmp_path}/d", classes=str(tmp_path / "names.txt"))
    with complaint("--classes", "nowhere", "expected a file"):
        loaded(f"folder:{tmp_path}/d", classes="nowhere")


def test_two_class_folders_of_the_same_name(tmp_path):
    touch(tmp_path, "Dog/a.jpg", "dog/b.jpg")
    with complaint("two class names that are the same", "dog"):
        loaded(f"folder:{tmp_path}")


def test_prompts_templates_and_lines_of_a_class(tmp_path):
    touch(tmp_path / "d", "cat/a.jpg", "dog/b.jpg")
    (tmp_path / "p.txt").write_text("a photo of {}.\na drawing of {}.\ndog\tman's best friend\n")
    samples = loaded(f"folder:{tmp_path}/d", prompts=str(tmp_path / "p.txt"))
    assert samples.prompts == [["a photo of cat.", "a drawing of cat."], ["man's best friend"]]


@pytest.mark.parametrize(
    "text, words",
    [
        ("cat\ta cat\n", ("no prompt for class 'dog'",)),
        ("cow\ta cow\n", ("p.txt:1", "no class 'cow'")),
        ("a photo\n", ("p.txt:1", "{}")),
        ("", ("empty file",)),
    ],
)
def test_prompts_that_do_not_fit(tmp_path, text, words):
    touch(tmp_path / "d", "cat/a.jpg", "dog/b.jpg")
    (tmp_path / "p.txt").write_text(text)
    with complaint("--prompts", *words):
        loaded(f"folder:{tmp_path}/d", prompts=str(tmp_path / "p.txt"))


def table_of(path, header, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return f"csv:{path}"


def test_csv_of_names(tmp_path):
    touch(tmp_path, "a.jpg", "b/c.jpg", "b/d.jpg")
    samples = loaded(
        table_of(
            tmp_path / "t.csv",
            "filename;label;split;place",
            "a.jpg;dog;train;sea",
            "b/c.jpg;cat;test;land",
            "b/d.jpg;cat;val;sea",
        )
    )
    assert rows(samples) == [
        ("train", "dog", "sea", "a.jpg"),
        ("test", "cat", "land", "c.jpg"),
        ("val", "cat", "sea", "d.jpg"),
    ]


def test_csv_of_numbers_without_split_and_place(tmp_path):
    touch(tmp_path, *[f"{k}.jpg" for k in range(20)])
    samples = loaded(
        table_of(tmp_path / "t.csv", "path,y", *[f"{k}.jpg,{k % 2}" for k in range(20)]), splits=True
    )
    assert (
        samples.y.tolist() == [0, 1] * 10
        and samples.classes == ["0", "1"]
        and [int((samples.split == s).sum()) for s in range(3)] == [12, 4, 4]
    )
    (tmp_path / "n.txt").write_text("zero\none\n")
    assert loaded(f"csv:{tmp_path}/t.csv", classes=str(tmp_path / "n.txt")).classes == ["zero", "one"]


def test_csv_of_absolute_paths_may_lie_anywhere(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    samples = loaded(
        table_of(
            tmp_path / "elsewhere/t.csv", "path,label", f"{tmp_path}/a/1.jpg,cat", f"{tmp_path}/b/2.jpg,dog"
        )
    )
    assert [Path(i.path) for i in samples.items] == [tmp_path / "a/1.jpg", tmp_path / "b/2.jpg"]
    with complaint("t.csv:3", "listed already"):
        loaded(
            table_of(tmp_path / "t.csv", "path,label", f"{tmp_path}/a/1.jpg,cat", f"{tmp_path}/a/1.jpg,dog")
        )


@pytest.mark.parametrize(
    "header, line, words",
    [
        ("name,y", "a.jpg,0", ("no column 'path'", "name, y")),
        ("path,z", "a.jpg,0", ("no column 'y'",)),
        ("path,y", "a.jpg,x", ("t.csv:2", "'x'")),
        ("path,y,split", "a.jpg,0,later", ("t.csv:2", "'later'")),
        ("path,y", "a.jpg", ("t.csv:2", "1 fields")),
        ("path,y", "../a.jpg,0", ("t.csv:2", "inside")),
        ("path,y", "gone.jpg,0", ("do not exist", "gone.jpg")),
        ("path,y", "a.jpg,", ("t.csv:2", "y is empty")),
        ("path,label", "a.jpg,cat\n./a.jpg,dog", ("t.csv:3", "listed already in line 2")),
        ("path,y", "", ("no rows",)),
    ],
)
def test_csv_that_cannot_be_used(tmp_path, header, line, words):
    touch(tmp_path, "a.jpg")
    with complaint("t.csv", *words):
        loaded(table_of(tmp_path / "t.csv", header, line))
    with complaint("no such file"):
        loaded(f"csv:{tmp_path}/nowhere.csv")


def faces(root, csv_files=False, n=12):
    """A small CelebA: photo k is blond if k is odd, male if k // 2 is."""
    touch(root, *[f"img_align_celeba/{k:06}.jpg" for k in range(n)])

    def sign(v):
        return "1" if v else "-1"

    lines = [(f"{k:06}.jpg", sign(k % 2), sign(0), sign(k // 2 % 2)) for k in range(n)]
    parts = [(f"{k:06}.jpg", str(k // 4)) for k in range(n)]
    join = ",".join if csv_files else "  ".join
    header = (
        [join(("image_id", "Blond_Hair", "Young", "Male"))]
        if csv_files
        else [str(n), "Blond_Hair Young Male"]
    )
    kind = "csv" if csv_files else "txt"
    (root / f"list_attr_celeba.{kind}").write_text("\n".join([*header, *map(join, lines)]))
    (root / f"list_eval_partition.{kind}").write_text(
        "\n".join([*["image_id,partition"] * csv_files, *map(join, parts)])
    )
    return f"celeba:{root}"


@pytest.mark.parametrize("csv_files", [False, True])
def test_celeba_official_files(tmp_path, csv_files):
    samples = loaded(faces(tmp_path, csv_files), splits=True)
    assert (
        samples.y.tolist() == [0, 1] * 6
        and samples.place.tolist() == [0, 0, 1, 1] * 3
        and samples.split.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    assert samples.prompts == [
        ["A photo of a celebrity with dark hair."],
        ["A photo of a celebrity with blond hair."],
    ]
    assert (
        len(warnings(samples)) == 1
        and "71629" in warnings(samples)[0]
        and "[1, 1, 1, 1]" in warnings(samples)[0]
    )


def test_celeba_incomplete_or_wrong(tmp_path):
    spec = faces(tmp_path)
    (tmp_path / "img_align_celeba/000003.jpg").unlink()
    samples = loaded(spec)
    assert (
        len(samples.items) == 11
        and samples.y.tolist()[:4] == [0, 1, 0, 0]
        and any("1 of its 12 images" in w for w in warnings(samples))
    )
    attributes = tmp_path / "list_attr_celeba.txt"
    attributes.write_text(attributes.read_text().replace("Male", "Mail"))
    with complaint("'Male'"):
        loaded(spec)
    attributes.write_text("")
    with complaint("list_attr_celeba.txt", "empty file"):
        loaded(spec)
    attributes.unlink()
    (tmp_path / "img_align_celeba.zip").write_bytes(b"PK")
    with complaint("list_attr_celeba", "img_align_celeba.zip: unpack it first"):
        loaded(spec)


def animals(root, generation=("common", "counter"), n=5):
    """A small CounterAnimal: brambling and bulbul on swapped backgrounds, an ostrich, and stray files."""
    for name, common, counter in (
        ("10 brambling", "grass", "sky"),
        ("16 bulbul", "sky", "grass"),
        ("9 ostrich", "ground", "water"),
    ):
        touch(
            root,
            *[f"{name}/{generation[0]}-{common}/{k}.jpg" for k in range(n)],
            *[f"{name}/{generation[1]}-{counter}/{k}.jpg" for k in range(n - 1)],
        )
    touch(root, "9 ostrich/leftover.jpg", "9 ostrich/other/x.jpg", "figures/a.jpg")
    (root / "plot.py").write_text("")
    (root / "notes.txt").write_text("")
    return root


@pytest.mark.parametrize("generation", [("common", "counter"), ("easy", "hard")])
def test_counteranimal_in_both_generations_of_names(tmp_path, generation):
    samples = loaded(f"counteranimal:{animals(tmp_path / 'LAION-final', generation).parent}")
    assert (
        samples.classes == ["ostrich", "brambling", "bulbul"]
        and samples.imagenet == [[9], [10], [16]]
        and samples.places == ["common", "counter"]
    )
    assert torch.bincount(samples.group()).tolist() == [5, 4] * 3 and len(samples.labels) == 1000
    assert samples.prompts[296] == ["A photo of ice bear, polar bear, Ursus Maritimus, Thalarctos maritimus."]
    assert sum("[7174, 5926]" in w and "[15, 12]" in w for w in warnings(samples)) == 1 and any(
        "3 files or folders" in w for w in warnings(samples)
    )
    train = loaded(f"counteranimal:{tmp_path}", splits=True)
    assert train.counts(0).tolist() == [3, 0] * 3 and any("100 % correlated" in n for n in train.notes)


def test_counteranimal_names_of_the_folder_itself(tmp_path):
    animals(tmp_path)
    (tmp_path / "imagenet_names.txt").write_text("".join(f"{k}\tthing {k}\n" for k in range(1000)))
    assert loaded(f"counteranimal:{tmp_path}").prompts[9] == ["A photo of thing 9."]
    (tmp_path / "imagenet_names.txt").write_text("1\tgoldfish\n")
    assert any("1 names" in w for w in warnings(loaded(f"counteranimal:{tmp_path}")))


def test_counteranimal_pair_is_trained_on_common_and_read_on_both(tmp_path):
    samples = loaded(f"counteranimal:{animals(tmp_path, n=11)}", classes="brambling,bulbul", splits=True)
    assert (
        samples.classes == ["brambling", "bulbul"]
        and samples.places == ["grass", "sky"]
        and samples.labels[0] == "brambling, Fringilla montifringilla"
    )
    assert [samples.counts(s).tolist() for s in range(3)] == [[7, 0, 0, 7], [2, 2, 2, 2], [2, 8, 8, 2]]
    some = loaded(f"counteranimal:{tmp_path}", classes="brambling,bulbul", splits=True, confounder=0.8)
    assert some.counts(0).tolist() == [7, 2, 2, 7]


@pytest.mark.parametrize(
    "pair, words",
    [
        ("brambling,bulbull", ("'bulbull'",)),
        ("bulbul", ("different names",)),
        ("bulbul,bulbul", ("different names",)),
        ("bulbul,ostrich:x", ("'ostrich:x'",)),
    ],
)
def test_counteranimal_pair_that_is_none(tmp_path, pair, words):
    with complaint(*words):
        loaded(f"counteranimal:{animals(tmp_path)}", classes=pair)


def test_counteranimal_wrong_folder(tmp_path):
    touch(tmp_path, "ostrich/a.jpg")
    with complaint("'9 ostrich'", "counteranimal:help"):
        loaded(f"counteranimal:{tmp_path}")
    with complaint("no such folder"):
        loaded(f"counteranimal:{tmp_path}/nowhere")


def contexts(root, swap=False, n=10):
    for first, second, k in (
        (a, b, k)
        for a in ("autumn", "grass", "water")
        for b in ("car", "hot air balloon", "truck")
        for k in range(n - 2 * (a == "grass"))
    ):
        touch(root, f"{second}/{first}/{k}.jpg" if swap else f"{first}/{second}/{k}.jpg")
    return root


@pytest.mark.parametrize("swap", [False, True])
def test_nico_contexts_and_classes_whichever_way_the_folders_lie(tmp_path, swap):
    samples = loaded(f"nico:{contexts(tmp_path, swap)}", splits=True)
    assert samples.classes == ["car", "hot air balloon", "truck"] and samples.places == [
        "autumn",
        "grass",
        "water",
    ]
    assert (
        torch.bincount(samples.group()).tolist() == [10, 8, 10] * 3
        and sum("88866" in w for w in warnings(samples)) == 1
    )
    assert any("class/context folders" in w for w in warnings(samples)) == swap


def test_nico_pair(tmp_path):
    contexts(tmp_path / "train")
    samples = loaded(
        f"nico:{tmp_path}", classes="car,truck", splits=True
    )  # on the two contexts with most photos
    assert (
        samples.classes == ["car", "truck"]
        and samples.places == ["autumn", "water"]
        and samples.counts(0).tolist() == [6, 0, 0, 6]
        and samples.counts(1).tolist() == [2] * 4
    )
    assert any(
        "not reached" in w for w in warnings(loaded(f"nico:{tmp_path}", classes="car,truck", confounder=0.1))
    )
    named = loaded(
        f"nico:{tmp_path}",
        classes="truck,hot air balloon",
        places="grass,autumn",
        splits=True,
        confounder=0.75,
    )
    assert (
        named.classes == ["truck", "hot air balloon"]
        and named.places == ["grass", "autumn"]
        and named.counts(0).tolist() == [5, 2, 2, 6]
    )
    for classes, places, word in (("car,lorry", "", "lorry"), ("car,truck", "autumn,moon", "moon")):
        with complaint(word):
            loaded(f"nico:{tmp_path}", classes=classes, places=places)
    touch(tmp_path / "flat", "a.jpg")
    with complaint("context/class"):
        loaded(f"nico:{tmp_path / 'flat'}")
    touch(tmp_path / "one", "autumn/car/a.jpg", "autumn/truck/b.jpg", "autumn/train/c.jpg")
    with complaint("autumn"):
        loaded(f"nico:{tmp_path / 'one'}", classes="car,truck")
    touch(
        tmp_path / "trains",
        *[f"{c}/{p}/{k}.jpg" for c in ("train", "car") for p in ("grass", "rock") for k in range(6)],
    )
    assert loaded(f"nico:{tmp_path / 'trains'}", classes="train,car").places == ["grass", "rock"]


def coco(root, parts=("train2017", "val2017"), n=20):
    """A small COCO: by k % 4 a man or a woman with a ball or a fork; then an image of both, one of nobody,
    and one with both objects."""
    kinds = [
        dict(id=1, name="person", supercategory="person"),
        dict(id=37, name="sports ball", supercategory="sports"),
        dict(id=48, name="fork", supercategory="kitchen"),
    ]
    for p, part in enumerate(parts):
        touch(root / part, *[f"{p}{k:03}.jpg" for k in range(n + 3)])

        def words(k):
            return (
                "A man and a Woman."
                if k == n
                else "A dog."
                if k == n + 1
                else ("A woman's hat", "The MAN, here")[k % 2]
            )

        def things(k):
            return (37, 48) if k == n + 2 else (37,) if k % 4 < 2 else (48,)

        images = [dict(id=100 * p + k, file_name=f"{p}{k:03}.jpg", width=16, height=12) for k in range(n + 3)]
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/captions_{part}.json").write_text(
            data.json.dumps(
                dict(
                    images=images,
                    annotations=[
                        dict(image_id=100 * p + k, caption=c)
                        for k in range(n + 3)
                        for c in (words(k), "Somebody.")
                    ],
                )
            )
        )
        (root / f"annotations/instances_{part}.json").write_text(
            data.json.dumps(
                dict(
                    images=images,
                    categories=kinds,
                    annotations=[
                        dict(image_id=100 * p + k, category_id=c, bbox=[0, 0, 4, 4])
                        for k in range(n + 3)
                        for c in (1, *things(k))
                    ],
                )
            )
        )
    return root


def test_cocogender_groups_by_the_documented_rule(tmp_path):
    samples = loaded(f"cocogender:{coco(tmp_path)}", splits=True)
    assert (
        samples.classes == ["man", "woman"]
        and samples.places == ["sports", "kitchen"]
        and any("6 images do not fit" in n or "6 do not" in n for n in samples.notes)
    )
    assert [samples.counts(s).tolist() for s in range(3)] == [[4, 0, 0, 4], [1, 1, 1, 1], [5, 5, 5, 5]]
    assert rows(samples)[0][1:] == ("man", "sports", "0001.jpg") if samples.split[0] else True
    assert {r[3] for r in rows(samples) if r[0] == "test"} == {f"1{k:03}.jpg" for k in range(20)}
    other = loaded(f"cocogender:{tmp_path}", places="fork,sports ball", splits=True, confounder=0.8)
    assert other.places == ["fork", "sports ball"] and other.counts(0).tolist() == [4, 1, 1, 4]


def test_cocogender_missing_captions_categories_images(tmp_path):
    coco(tmp_path)
    (tmp_path / "val2017/1003.jpg").unlink()
    assert any("1 of its" in w and "do not exist" in w for w in warnings(loaded(f"cocogender:{tmp_path}")))
    with complaint("unicorn", "categories of COCO"):
        loaded(f"cocogender:{tmp_path}", places="unicorn,sports")
    coco(tmp_path / "years", ("train2014", "val2017"))
    for what in ("captions", "instances"):  # val2017's photos are in train2014 too
        for part, step in (("train2014", 0), ("val2017", -100)):
            path = tmp_path / f"years/annotations/{what}_{part}.json"
            tree = data.json.loads(path.read_text())
            for row in (*tree["images"], *tree["annotations"]):
                row.update({k: row[k] + step for k in ("id", "image_id") if k in row})
            path.write_text(data.json.dumps(tree))
    with complaint("one year"):
        loaded(f"cocogender:{tmp_path}/years")
    captions = tmp_path / "annotations/captions_train2017.json"
    whole = captions.read_text()
    for text, words in (
        (whole.replace('"caption"', '"text"'), ("captions_train2017.json", "'caption'")),
        (whole[:50], ("captions_train2017.json", "not ")),
        ("{}", ("captions_train2017.json", "'annotations'")),
    ):
        captions.write_text(text)
        with complaint(*words):
            loaded(f"cocogender:{tmp_path}")
    captions.write_text(whole)
    (tmp_path / "annotations/instances_val2017.json").unlink()
    with complaint("instances"):
        loaded(f"cocogender:{tmp_path}")
    for part in ("train2017", "val2017"):
        (tmp_path / f"annotations/captions_{part}.json").unlink()
    with complaint("captions"):
        loaded(f"cocogender:{tmp_path}")


def test_in9_variations_are_places_and_a_photo_is_in_one_split(tmp_path):
    touch(
        tmp_path / "bg_challenge",
        *[
            f"{v}/val/{c}/n02085936_{k}_{v}.JPEG"
            for v in ("mixed_rand", "mixed_same", "original")
            for c in ("00_dog", "02_wheeled vehicle")
            for k in range(30)
        ],
    )
    samples = loaded(f"in9:{tmp_path}", splits=True)
    assert samples.classes == ["dog", "wheeled vehicle"] and samples.places == [
        "original",
        "mixed_same",
        "mixed_rand",
    ]
    split_of = {}
    for r in rows(samples):
        split_of.setdefault(r[3].split("_")[1], set()).add(r[0])
    assert all(len(s) == 1 for s in split_of.values()) and len(set.union(*split_of.values())) == 3
    assert any("4050" in w and "60" in w for w in warnings(samples)) and samples.imagenet == []
    (tmp_path / "in_to_in9.json").write_text('{"151": 0, "152": 0, "407": 1, "999": -1}')
    assert loaded(f"in9:{tmp_path}").imagenet == [[151, 152], [407]]
    with complaint("original, mixed_same", "in9:help"):
        loaded(f"in9:{tmp_path / 'bg_challenge/original'}")


def test_imagenet_by_wordnet_id_or_by_order(tmp_path):
    touch(tmp_path / "ids", "n01440764/a.JPEG", "n01440764/b.JPEG", "n15075141/c.JPEG")
    samples = loaded(f"imagenet:{tmp_path}/ids")
    assert (
        samples.y.tolist() == [0, 0, 999]
        and samples.labels[999] == "toilet paper"
        and any("2 of 1000" in w for w in warnings(samples))
    )
    touch(tmp_path / "files", "n15075141_x.jpg", "n01443537.jpg")
    assert loaded(f"imagenet:{tmp_path}/files").y.tolist() == [1, 999]
    for k in range(1000):
        (tmp_path / f"order/class{k:04}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"order/class{k:04}.jpg").touch()
    assert loaded(f"imagenet:{tmp_path}/order").y.tolist() == list(range(1000))
    (tmp_path / "order/class0500.jpg").unlink()
    with complaint("999 images", "n01440764"):
        loaded(f"imagenet:{tmp_path}/order")


@pytest.mark.parametrize("name", list(data.SETS))
def test_help_of_every_data_set_says_how_it_looks_and_exits_0(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load(f"{name}:help")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(name)


@pytest.mark.parametrize("name", [n for n in data.SETS if n not in ("scenes", "csv", "digits", "cutouts")])
def test_every_data_set_says_what_a_wrong_folder_holds(tmp_path, name):
    (tmp_path / "everything.tar.gz").write_bytes(b"x")
    with complaint("everything.tar.gz: unpack it first"):
        loaded(f"{name}:{tmp_path}")
    with complaint("nowhere", "no such folder"):
        loaded(f"{name}:{tmp_path / 'nowhere'}")


def test_a_table_is_read_and_checked_in_little_more_than_reading_it_row_by_row(tmp_path):
    """A million rows take 3 s; in one run, so that the machine does not matter. Row by row with all checks
    it is four times this."""
    for k in range(10):
        (tmp_path / f"{k}").mkdir()
    for k in range(20000):
        (tmp_path / f"{k % 10}/{k}.jpg").touch()
    (tmp_path / "metadata.csv").write_text(
        "\n".join(
            [
                ",".join(COLUMNS),
                *[f"{k},{k % 10}/{k}.jpg,{k % 2},{k // 4 % 3},{k // 2 % 2},-" for k in range(20000)],
            ]
        )
    )

    def seconds(f):
        def once():
            started = time.process_time()
            assert len(f()) == 20000
            return time.process_time() - started

        return min(once() for _ in range(3))

    def by_row():
        with open(tmp_path / "metadata.csv", newline="") as file:
            return [
                data.Photo(os.path.join(tmp_path, r["img_filename"]))
                for r in csv.DictReader(file)
                if os.path.isfile(os.path.join(tmp_path, r["img_filename"]))
            ]

    assert seconds(lambda: load(f"waterbirds:{tmp_path}").items) < 2 * seconds(by_row)


# --- layers and composites


def test_cutout_is_cropped_to_what_is_visible(tmp_path):
    assert data.Cutout(cutout(tmp_path / "a.png")).image().size == (39, 51)


def test_cutout_without_alpha_or_fully_transparent_is_named(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "rgb.png")
    Image.new("RGBA", (30, 30), (9, 9, 9, 255)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (30, 30), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    for name, words in (
        ("rgb", "no transparency"),
        ("opaque", "no transparency"),
        ("clear", "nothing visible"),
    ):
        with complaint(tmp_path / f"{name}.png", words):
            data.Cutout(str(tmp_path / f"{name}.png")).image()


def raw_material(tmp_path, n=9):
    for k in range(n):
        cutout(tmp_path / f"f/{k}.png", 40 + k, (20 * k, 200 - 20 * k, 90))
        photo(tmp_path / f"b/{k}.jpg", k, (64, 64))
    return str(tmp_path / "f"), str(tmp_path / "b")


def material(foregrounds, backgrounds, skip_bad=False):
    """Figures, grounds and notes of two folders."""
    figures, notes = data.layers(foregrounds, data.Cutout, "foregrounds", skip_bad)
    grounds, more = data.layers(backgrounds, data.Ground, "backgrounds", skip_bad)
    return figures, grounds, notes + more


def test_layers_stop_at_a_bad_file_and_skip_bad_names_it_instead(tmp_path):
    folders = raw_material(tmp_path)
    (tmp_path / "b/bad.jpg").write_bytes(b"")
    Image.new("RGB", (30, 30)).save(tmp_path / "f/plain.png")
    with complaint("plain.png"):
        material(*folders)
    figures, grounds, notes = material(*folders, skip_bad=True)
    assert (
        len(figures) == len(grounds) == 9
        and len(notes) == 2
        and "plain.png" in notes[0]
        and "bad.jpg" in notes[1]
    )


def test_layers_want_enough_of_each(tmp_path):
    with complaint("--foregrounds", "there are 3"):
        material(*raw_material(tmp_path, 3))


def layered(tmp_path, **more):
    figures, grounds, _ = material(*raw_material(tmp_path))
    return data.composites(figures, grounds, **dict(dict(instances=6, per=3, seed=1), **more))


def test_composites_of_one_seed_are_the_same_in_any_order_and_number(tmp_path):
    items, i, j = layered(tmp_path)
    more, i2, j2 = layered(tmp_path, instances=12)
    assert more[:18] == items and i2[:18].tolist() == i.tolist() and j2[:18].tolist() == j.tolist()
    first = [digest(c.image()) for c in items]
    assert [digest(c.image()) for c in reversed(items)] == first[::-1] and [c.key() for c in items] == [
        c.key() for c in more[:18]
    ]


def test_composites_of_another_seed_differ(tmp_path):
    a, b = layered(tmp_path)[0], layered(tmp_path, seed=2)[0]
    assert all(
        x != y and x.key() != y.key() and digest(x.image()) != digest(y.image())
        for x, y in zip(a, b, strict=False)
    )


def test_composites_one_instance_has_one_figure_and_pose_on_different_backgrounds(tmp_path):
    items, i, j = layered(tmp_path)
    for k in range(6):
        mine = [c for c, a in zip(items, i.tolist(), strict=False) if a == k]
        assert (
            len(mine) == 3
            and len({(c.figure, c.pose) for c in mine}) == 1
            and len({c.ground for c in mine}) == 3
        )
    assert len({c.pose for c in items}) == 6
    assert all(c.ground.path.endswith(f"/{b}.jpg") for c, b in zip(items, j.tolist(), strict=False))


def test_composite_alone_on_grey_and_background_alone(tmp_path):
    from dataclasses import replace

    c = layered(tmp_path)[0][0]
    figure, at = data.posed(c.figure.image(), c.pose, c.size)
    box = (*at, at[0] + figure.width, at[1] + figure.height)
    outside = np.ones((c.size, c.size), bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    whole, alone, ground = (
        np.asarray(x.image()) for x in (c, replace(c, ground=None), replace(c, figure=None))
    )
    assert (alone[outside] == data.GREY).all() and (whole[outside] == ground[outside]).all()
    inside = np.zeros_like(outside)
    inside[box[1] : box[3], box[0] : box[2]] = np.asarray(figure)[..., 3] == 255
    assert inside.any() and (whole[inside] == alone[inside]).all() and (whole[inside] != ground[inside]).any()


def test_composite_alpha_is_where_its_foreground_stands(tmp_path):
    from dataclasses import replace

    for c in layered(tmp_path)[0][::3]:
        whole, alone, ground = (
            np.asarray(x.image()) for x in (c, replace(c, ground=None), replace(c, figure=None))
        )
        alpha = np.asarray(c.alpha())
        assert alpha.shape == whole.shape[:2] and 0.02 < (alpha > 128).mean() < 0.5
        assert (whole[alpha == 0] == ground[alpha == 0]).all() and (
            whole[alpha == 255] == alone[alpha == 255]
        ).all()


@pytest.mark.parametrize("area", [0.06, 0.2, 0.4])
def test_pose_area_is_the_share_of_the_frame_and_the_figure_stays_inside(area):
    figure = Image.new("RGBA", (60, 50), (9, 9, 9, 255))
    for x, y in ((0, 0), (1, 1), (0.3, 0.8)):
        posed, at = data.posed(figure, data.Pose(area, x, y), 200)
        assert abs(posed.width * posed.height / 200**2 - area) < 0.01
        assert min(at) >= 0 and at[0] + posed.width <= 200 and at[1] + posed.height <= 200


def test_pose_flip_mirrors():
    figure = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    figure.paste((0, 0, 255, 255), (0, 0, 20, 40))

    def left(flip):
        return data.posed(figure, data.Pose(0.2, flip=flip), 200)[0].getpixel((10, 20))[:3]

    assert left(False) == (0, 0, 255) and left(True) == (255, 0, 0)


def test_key_changes_with_the_file(tmp_path):
    path = photo(tmp_path / "a.png", 0)
    before = data.Photo(path).key(), data.Composite(None, data.Ground(path), None).key()

    def keys():
        return {data.Photo(path).key(), data.Composite(None, data.Ground(path), None).key()}

    at = os.stat(path)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns + 1))
    assert not set(before) & keys()
    photo(tmp_path / "a.png", 1, (50, 40))
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert not set(before) & keys()


def masked_birds(tmp_path):
    spec = birds(tmp_path / "birds")
    for k in range(12):
        mask = Image.new("L", (16, 12))
        mask.paste(255, (4, 3, 12, 9))
        (tmp_path / "m/s").mkdir(parents=True, exist_ok=True)
        mask.save(tmp_path / f"m/s/{k}.png")
    return spec, str(tmp_path / "m")


def test_mask_of_another_size_names_both(tmp_path):
    spec, masks = masked_birds(tmp_path)
    Image.new("L", (9, 9), 255).save(tmp_path / "m/s/0.png")
    with complaint("s/0.png", "9x9", "16x12"):
        load(spec, masks).cut[0].image()


def test_masks_that_fit_no_image(tmp_path):
    spec, _ = masked_birds(tmp_path)
    (tmp_path / "none").mkdir()
    with complaint("--masks", tmp_path / "none", ".jpg one of", ".png"):
        load(spec, str(tmp_path / "none"))


# --- drawn scenes


PIXELS = """
import hashlib, data
samples = data.drawn_scenes(.75, 3, sizes=(24, 4, 4))
cells = data.composites(*material("drawn", "drawn", seed=3)[:2], 4, 2, 3)[0]
h = hashlib.sha256()
for c in [*samples.items[:12], *cells]:
    h.update(c.image().tobytes() + c.key().encode())
print(h.hexdigest())
"""


# --- tables and pages


def test_table_aligns_and_shows_three_decimals_and_a_dash():
    lines = data.table(("name", "x", "n"), [("a", 0.12345, 7), ("long name", None, 12)]).splitlines()
    assert [line.split() for line in lines] == [
        ["name", "x", "n"],
        ["-" * 9, "-" * 5, "-" * 2],
        ["a", "0.123", "7"],
        ["long", "name", "-", "12"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_page_is_self_contained_and_escapes():
    figure = data.thumb(Image.new("RGBA", (400, 300), (9, 90, 9, 128)), "a <b> & c")
    bars = data.bars([("erm", 0.5, (0.4, 0.6), "n=3"), ("<bap>", 0.9, None, "<i>")])
    rows = data.html_table(("a", "<script>"), [("<i>", None), (1, 0.5)])
    text = data.page(
        "<title>", "5 < 6 <img onerror=x>", [("x & y", figure, bars, rows, "<script>"), ("<u>", "plain")]
    )
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert len(links) == 1 and links[0].startswith("data:image/jpeg;base64,")
    assert not any(
        word in text for word in ("http", "@import", "url(", "<script", "<i>", "<bap>", "<u>", "<img onerror")
    )
    assert (
        "&lt;title&gt;" in text and "x &amp; y" in text and "0.500" in text and "a &lt;b&gt; &amp; c" in text
    )


def test_thumb_holds_a_readable_jpeg_no_larger_than_twice_its_box():
    import base64

    code = re.search(r"base64,([^\"]+)", data.thumb(Image.new("RGB", (900, 600), "red"), size=100)).group(1)
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    assert image.format == "JPEG" and image.size == (200, 133) and image.getpixel((5, 5))[0] > 240


# --- real data


@pytest.mark.skipif(
    "FLOCK_DATA" not in os.environ,
    reason="FLOCK_DATA (a folder with minibirds_1.0, bird_masks, cutouts, scenes) is not set",
)
def test_real_birds_cutouts_and_scenes():
    real = Path(os.environ["FLOCK_DATA"])
    samples = load(f"waterbirds:{real / 'minibirds_1.0'}", str(real / "bird_masks"))
    assert samples.counts(0).tolist() == [502, 0, 0, 264] and len(samples.items) == 2882 and all(samples.cut)
    assert any("100 % correlated" in note for note in samples.notes)
    assert all(
        cut.image().size == item.image().size
        for cut, item in list(zip(samples.cut, samples.items, strict=False))[::400]
    )
    figures = [data.Cutout(str(p)) for p in pictures(real / "cutouts", "foregrounds")]
    assert len(figures) == 127 and all(f.image().mode == "RGBA" for f in figures[::9])


# --- controlled settings


@pytest.mark.parametrize("strength", [0.7, 0.8, 0.9, 0.95, 0.99])
def test_digits_have_the_correlation_asked_for_and_uncorrelated_test_groups(strength):
    s = load(f"digits:{strength}:3")
    train = s.split == 0
    a, b = s.y[train] == 3, s.place[train] == 1
    phi = np.corrcoef(a.numpy(), b.numpy())[0, 1]
    assert phi == pytest.approx(strength, abs=0.005) and len(a) == 10_000
    assert set(s.counts(1).tolist()) == set(s.counts(2).tolist()) == {100} and f"{phi:.3f}" in s.notes[0]
    assert s.name != load(f"digits:{strength}:4").name


def test_digits_at_strength_zero_are_the_base_set():
    assert set(load("digits").counts(0).tolist()) == {500}


def test_a_digit_and_a_rectangle_lie_where_the_sample_says():
    s = load("digits:0.9:0")
    for k in (0, 950, 5000, 12001):
        image = np.asarray(s.items[k].image(), int)
        assert image.shape == (56, 56, 3)

        def quarter(box, image=image):
            return image[round(box[1] * 56) : round(box[3] * 56), round(box[0] * 56) : round(box[2] * 56)]

        figure, mark = s.shows[k]
        white, red = (quarter(figure)[..., 2] > 128).sum(), (image[..., 0] - image[..., 1] > 128)
        assert 20 < white < 400 and s.captions[k].rstrip(".").endswith(s.classes[s.y[k]])
        assert (mark is not None) == bool(s.place[k]) == bool(red.any())
        assert mark is None or ((quarter(mark)[..., 0] > 128).sum() >= 12 * 12 and mark != figure)
        rest = image.sum() - sum(quarter(b).sum() for b in (figure, mark) if b)
        assert rest == 0


def test_drawn_digits_differ_repeat_and_share_nothing_between_splits():
    s, again, other = load("digits:0.95:1"), load("digits:0.95:1"), load("digits:0.95:1", seed=1)
    some = range(0, 14_000, 700)
    pixels = [s.items[k].image().tobytes() for k in some]
    assert pixels == [again.items[k].image().tobytes() for k in some] and len(set(pixels)) == len(pixels)
    assert not set(pixels) & {other.items[k].image().tobytes() for k in some}
    keys = [i.figure.key() for i in s.items]
    assert len(set(keys)) == len(keys) and s.name != other.name
    ones, eights = ([np.asarray(data.draw_digit(d, (0, k)), float).mean() for k in range(30)] for d in (1, 8))
    assert np.mean(ones) < np.mean(eights)


def idx(path, array):
    """An IDX file of bytes."""
    head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_mnist_files_are_read_used_once_each_and_refused_where_they_are_broken(tmp_path):
    g = np.random.default_rng(0)
    for name, n in (("train", 15000), ("t10k", 2500)):
        idx(tmp_path / f"{name}-images-idx3-ubyte", g.integers(0, 256, (n, 28, 28)))
        idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(n) % 10)
    samples = load(f"digits:0.95:3:{tmp_path}")
    pixels = [item.figure.pixels for item in samples.items]
    assert len(set(pixels)) == len(pixels) == 14000 and all(
        item.figure.digit == y for item, y in zip(samples.items, samples.y.tolist(), strict=False)
    )
    idx(tmp_path / "train-labels-idx1-ubyte", np.arange(7) % 10)
    with complaint("15000 images, 7 labels"):
        load(f"digits:0.95:3:{tmp_path}")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"<html>")
    idx(tmp_path / "train-labels-idx1-ubyte", np.arange(15000) % 10)
    with complaint("t10k-images-idx3-ubyte", "IDX"):
        load(f"digits:0.95:3:{tmp_path}")
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with complaint("t10k-images-idx3-ubyte", "no such file"):
        load(f"digits:0.95:3:{tmp_path}")


@pytest.mark.parametrize("spurious", ["10", "-1", "eleven"])
def test_a_spurious_class_that_is_none_is_one_line(spurious):
    with complaint("--spurious", spurious, "zero"):
        data.load_data("digits", strength=0.9, spurious=spurious)


def test_region_truth_is_by_the_smaller_of_region_and_thing():
    frame = (0.0, 0.0, 1.0, 1.0)
    picture = data.Regions(
        None, ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 1.0), (0.3, 0.0, 0.8, 0.5)), frame
    )
    figure, mark = data.region_truth(
        [picture, picture], [((0.0, 0.0, 0.5, 0.5), None), ((0.5, 0.0, 1.0, 0.5), (0.4, 0.35, 0.6, 0.6))]
    )
    assert figure.tolist() == [True, False, True, False, False, True, True, True]
    assert mark.tolist() == [False] * 4 + [False, False, True, True]
    figure, mark = data.region_truth(
        [picture, picture],
        [(((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 0.6, 0.1)), data.SCENE), ((0.45, 0.45, 0.9, 0.9), data.SCENE)],
    )
    assert figure.tolist() == [True, True, True, True, False, False, True, False]
    assert mark.tolist() == [
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
    ]  # at most a tenth of the region is the object


# --- regions


@pytest.mark.parametrize(
    "spec, sides", [("grid:1", [1]), ("grid:3", [3]), ("grid:2,4", [2, 4]), ("grid:64", [64])]
)
def test_grid_tiles_the_frame_at_every_scale_row_by_row(spec, sides):
    boxes = data.grid(spec)
    assert boxes.shape == (sum(n * n for n in sides), 4)
    for n, part in zip(sides, boxes.split([n * n for n in sides]), strict=False):
        for k, box in enumerate(part.tolist()):
            assert box == pytest.approx([k % n / n, k // n / n, (k % n + 1) / n, (k // n + 1) / n])


@pytest.mark.parametrize(
    "spec", ["grid", "grid:", "grid:0", "grid:65", "grid:3,", "grid:-2", "grid:2.5", "grid:a", "gird:3"]
)
def test_grid_that_is_none(spec):
    with complaint("--regions", repr(spec), "grid:N"):
        data.grid(spec)


def test_crop_is_a_part_of_the_picture_and_never_empty(tmp_path):
    path = photo(tmp_path / "a.png", 3, (40, 20))
    whole = np.asarray(Image.open(path))

    def part(*box):
        return np.asarray(data.Crop(data.Photo(path), box).image())

    assert np.array_equal(part(0.25, 0.5, 0.75, 1.0), whole[10:20, 10:30]) and np.array_equal(
        part(0.0, 0.0, 1.0, 1.0), whole
    )
    assert part(0.51, 0.51, 0.515, 0.515).shape == (1, 1, 3) and np.array_equal(
        part(1.0, 1.0, 1.0, 1.0)[0, 0], whole[-1, -1]
    )
    keys = {data.Crop(data.Photo(path), box).key() for box in ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5))}
    assert len(keys) == 2 and all(data.Photo(path).key() in k for k in keys)


def test_crops_of_a_picture_with_an_exif_rotation_are_upright(tmp_path):
    image, exif = Image.fromarray(np.arange(8 * 16 * 3, dtype="uint8").reshape(8, 16, 3)), Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.png", exif=exif)
    picture = data.Photo(str(tmp_path / "a.png"))
    assert data.picture_size(picture) == picture.image().size == (8, 16)
    assert data.Crop(picture, (0.0, 0.0, 1.0, 0.5)).image().size == (8, 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_picture_size_is_that_of_the_image(tmp_path, name):
    assert data.picture_size(data.Photo(photo(tmp_path / name, 0, (31, 17)))) == (31, 17)


def test_picture_size_of_scenes_and_of_what_is_no_picture(tmp_path):
    scene = load("scenes").items[0]
    assert data.picture_size(scene) == scene.image().size
    (tmp_path / "a.jpg").write_bytes(b"text")
    for name, what in (("a.jpg", "not a picture"), ("none.jpg", "no such file")):
        with complaint(tmp_path / name, what):
            data.picture_size(data.Photo(str(tmp_path / name)))


def middle(width, height):
    """A frame as of a centre crop: the largest square."""
    side = min(width, height)
    return 0.5 - side / width / 2, 0.5 - side / height / 2, 0.5 + side / width / 2, 0.5 + side / height / 2


def some_photos(tmp_path, sizes=((40, 20), (20, 20), (20, 50))):
    return [data.Photo(photo(tmp_path / f"p/s/{k}.png", k, size)) for k, size in enumerate(sizes)]


def test_regions_of_a_grid_lie_in_what_the_model_sees_and_are_shares_of_the_original(tmp_path):
    wide, square, tall = data.load_regions("grid:2", some_photos(tmp_path), middle)[0]
    assert (
        wide.boxes[0] == pytest.approx((0.25, 0, 0.5, 0.5))
        and wide.boxes[3] == pytest.approx((0.5, 0.5, 0.75, 1))
        and wide.frame == (0.25, 0, 0.75, 1)
    )
    assert (
        square.boxes[1] == pytest.approx((0.5, 0, 1, 0.5))
        and tall.boxes[0] == pytest.approx((0, 0.3, 0.5, 0.5))
        and tall.boxes[3] == pytest.approx((0.5, 0.5, 1, 0.7))
    )
    for regions in (wide, square, tall):
        assert torch.allclose(regions.seen(), data.grid("grid:2"), atol=1e-6)


def test_regions_key_tells_boxes_masks_and_files_apart(tmp_path):
    pictures = some_photos(tmp_path)
    mask = data.Photo(photo(tmp_path / "m.png", 1, (16, 16)))
    frame = (0.0, 0.0, 1.0, 1.0)
    keys = {
        data.Regions(p, boxes, frame, m, v).key()
        for p in pictures
        for boxes, m, v in (
            (((0.0, 0.0, 1.0, 1.0),), None, ()),
            (((0.0, 0.0, 1.0, 0.5),), None, ()),
            ((), None, ()),
            (((0.0, 0.0, 1.0, 1.0),), mask, (1,)),
            (((0.0, 0.0, 1.0, 1.0),), mask, (2,)),
        )
    }
    assert len(keys) == 15
    regions = data.Regions(pictures[0], (), frame)
    assert regions.image().size == (40, 20) and regions.seen().shape == (0, 4)


def test_seen_cuts_off_what_the_model_does_not_see():
    regions = data.Regions(
        None, ((0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 1.0), (0.6, 0.0, 0.9, 0.1)), (0.25, 0.0, 0.75, 1.0)
    )
    assert torch.allclose(regions.seen(), torch.tensor([[0, 0, 1, 1], [0, 0.5, 0.5, 1], [0.7, 0, 1, 0.1]]))


def test_mask_weights_are_shares_of_cells_in_the_frame(tmp_path):
    a = np.zeros((8, 16), "uint8")
    a[:, 4:7], a[4:, 8:] = 100, 200
    Image.fromarray(a).save(tmp_path / "m.png")
    regions = data.Regions(
        None, ((0,) * 4,) * 3, (0.25, 0.0, 0.75, 1.0), data.Photo(str(tmp_path / "m.png")), (0, 100, 200)
    )
    seen = a[:, 4:12]
    expected = torch.stack(
        [torch.from_numpy((seen == v).reshape(2, 4, 2, 4).mean((1, 3))) for v in (0, 100, 200)]
    ).float()
    assert torch.allclose(regions.weights(2, 2), expected, atol=0.01) and torch.allclose(
        regions.weights(2, 2).sum(0), torch.ones(2, 2), atol=0.01
    )


def boxes_file(path, rows, header="path,x1,y1,x2,y2"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_csv_boxes(tmp_path):
    path = boxes_file(
        tmp_path / "b.csv",
        ["a/x.jpg,1,2,3,4", "./a/y.jpg,0,0,5.5,6", "a/x.jpg,-1,2,30,4", "b\\z.jpg,1e1,2,30,40"],
    )
    assert data.csv_boxes(path) == {
        "a/x.jpg": [("line 2", 1, 2, 3, 4), ("line 4", -1, 2, 30, 4)],
        "a/y.jpg": [("line 3", 0, 0, 5.5, 6)],
        "b/z.jpg": [("line 5", 10, 2, 30, 40)],
    }
    other = boxes_file(
        tmp_path / "c.csv", ["9,4,3,cat,x.jpg,2,1"], "id,y2,x2,label,path,y1,x1"
    )  # in any order, with more
    assert data.csv_boxes(other) == {"x.jpg": [("line 2", 1, 2, 3, 4)]}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ("no column 'path'", "no rows")),
        ("path,x1,y1,x2\na,1,2,3\n", ("no column 'y2'", "path, x1, y1, x2")),
        ("path,x1,y1,x2,y2\na,1,2,3\n", ("b.csv:2", "4 fields")),
        ("path,x1,y1,x2,y2\na,1,2,3,4\nb,1,2,inf,4\n", ("line 3", "four numbers")),
        ("path,x1,y1,x2,y2\na,one,2,3,4\n", ("line 2", "'one'")),
    ],
)
def test_csv_boxes_that_are_none(tmp_path, text, words):
    (tmp_path / "b.csv").write_text(text)
    with complaint(tmp_path / "b.csv", *words):
        data.csv_boxes(str(tmp_path / "b.csv"))


def test_csv_boxes_in_a_file_that_is_no_text(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00binary")
    for name in ("b.csv", "none.csv"):
        with complaint(tmp_path / name, "table"):
            data.csv_boxes(str(tmp_path / name))


def coco_file(path, tree):
    path.write_text(json.dumps(tree))
    return str(path)


def test_coco_boxes_are_corners_and_crowds_are_left_out(tmp_path):
    tree = dict(
        images=[dict(id=5, file_name="x.jpg"), dict(id=6, file_name="d/y.jpg")],
        annotations=[
            dict(id=1, image_id=5, bbox=[1, 2, 3, 4]),
            dict(id=2, image_id=6, bbox=[0, 0, 1.5, 2], iscrowd=0),
            dict(id=3, image_id=5, bbox=[0, 0, 9, 9], iscrowd=1),
            dict(image_id=5, bbox=["7", 7, 1, 1]),
        ],
    )
    assert data.coco_boxes(coco_file(tmp_path / "c.json", tree)) == {
        "x.jpg": [("annotation 1", 1, 2, 4, 6), ("annotation None", 7, 7, 8, 8)],
        "d/y.jpg": [("annotation 2", 0, 0, 1.5, 2)],
    }


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {},
        dict(images=[]),
        dict(images=[], annotations=[dict(id=1, image_id=5, bbox=[1, 2, 3, 4])]),
        dict(images=[dict(id=5)], annotations=[]),
        dict(images=[dict(id=5, file_name="x")], annotations=[dict(image_id=5, bbox=[1, 2])]),
        dict(images=[dict(id=5, file_name="x")], annotations=[dict(image_id=5)]),
        dict(images=[dict(id=5, file_name="x")], annotations=[dict(image_id=5, bbox=None)]),
        dict(images=[], annotations=["x"]),
    ],
)
def test_coco_boxes_that_are_none(tmp_path, tree):
    path = coco_file(tmp_path / "c.json", tree)
    with complaint(path, "not a COCO instances file", "bbox"):
        data.coco_boxes(path)


def test_coco_boxes_that_are_not_finite(tmp_path):
    path = coco_file(
        tmp_path / "c.json",
        dict(
            images=[dict(id=5, file_name="0.png")],
            annotations=[dict(image_id=5, bbox=[1, 2, float("nan"), 4])],
        ),
    )
    with complaint(path):
        data.load_regions(f"coco:{path}", some_photos(tmp_path), middle)


def test_boxes_are_found_by_the_end_of_the_path_the_longest_first(tmp_path):
    pictures = some_photos(tmp_path)
    path = boxes_file(
        tmp_path / "b.csv",
        [
            "0.png,20,0,30,10",
            "s/0.png,10,0,20,20",
            "p/s/1.png,0,0,5,5",
            "s/2.png,0,20,20,30",
            "s/2.png,0,25,10,30",
            "other/7.png,0,0,1,1",
        ],
    )
    (a, b, c), notes = data.load_regions(f"boxes:{path}", pictures, middle)
    assert (
        a.boxes == ((0.25, 0, 0.5, 1),)
        and b.boxes == ((0, 0, 0.25, 0.25),)
        and c.boxes == ((0, 0.4, 1, 0.6), (0, 0.5, 0.5, 0.6))
        and notes == []
    )
    assert torch.allclose(a.seen(), torch.tensor([[0.0, 0, 0.5, 1]]))


def test_boxes_are_found_by_the_whole_path(tmp_path):
    pictures = some_photos(tmp_path)
    path = boxes_file(tmp_path / "b.csv", [f"{pictures[1].path},0,0,5,5"])
    assert [len(r.boxes) for r in data.load_regions(f"boxes:{path}", pictures, middle)[0]] == [0, 1, 0]


def test_boxes_over_an_edge_are_cut_and_those_in_the_margin_counted(tmp_path):
    path = boxes_file(
        tmp_path / "b.csv",
        ["0.png,-5,-5,20,10", "0.png,30,0,99,99", "0.png,0,0,10,20", "0.png,31,0,40,5", "1.png,0,0,20,20"],
    )
    (a, b, c), notes = data.load_regions(f"boxes:{path}", some_photos(tmp_path), middle)
    assert a.boxes == ((0, 0, 0.5, 0.5),) and b.boxes == ((0, 0, 1, 1),) and c.boxes == ()
    assert (
        len(notes) == 2
        and "1 of 3 pictures are not in it" in notes[1]
        and str(path) in notes[0]
        and "3 boxes" in notes[0]
        and "does not see" in notes[0]
    )


@pytest.mark.parametrize(
    "box, words",
    [
        ("40,0,50,10", ("outside", "40x20")),
        ("0,20,9,30", ("outside",)),
        ("-9,0,0,10", ("outside",)),
        ("5,5,5,9", ("no area",)),
        ("9,5,5,9", ("no area",)),
    ],
)
def test_box_outside_its_picture_or_without_area(tmp_path, box, words):
    path = boxes_file(tmp_path / "b.csv", ["1.png,0,0,5,5", f"0.png,{box}"])
    with complaint(path, "line 3", box, *words):
        data.load_regions(f"boxes:{path}", some_photos(tmp_path), middle)


def test_boxes_of_other_pictures(tmp_path):
    path = boxes_file(tmp_path / "b.csv", ["dogs/7.png,0,0,5,5"])
    with complaint(path, "no box for any of the 3 pictures", "dogs/7.png", "0.png"):
        data.load_regions(f"boxes:{path}", some_photos(tmp_path), middle)


@pytest.mark.parametrize("spec", ["boxes:", "boxes", "tiles:3", "", "masks:", "coco"])
def test_regions_that_are_none(tmp_path, spec):
    with complaint("--regions", "masks:DIR"):
        data.load_regions(spec, some_photos(tmp_path), middle)


def test_regions_by_masks_are_the_values_that_the_model_sees(tmp_path):
    pictures = some_photos(tmp_path)
    a = np.zeros((20, 40), "uint8")
    a[2:6, 12:18], a[:, :8], a[10:, 20:] = 50, 100, 200  # 100 lies in the margin
    (tmp_path / "m/s").mkdir(parents=True)
    Image.fromarray(a).save(tmp_path / "m/s/0.png")
    Image.fromarray(np.full((20, 20), 7, "uint8")).save(tmp_path / "m/1.png")
    (first, second, third), _ = data.load_regions(f"masks:{tmp_path / 'm'}", pictures, middle)
    assert first.values == (0, 50, 200) and first.mask.path.endswith("m/s/0.png")
    assert [tuple(b) for b in first.boxes] == [
        pytest.approx(v) for v in ((0.2, 0, 1, 1), (0.3, 0.1, 0.45, 0.3), (0.5, 0.5, 1, 1))
    ]
    assert (
        second.values == (7,)
        and tuple(second.boxes[0]) == (0, 0, 1, 1)
        and third.boxes == ()
        and third.mask is None
    )


def test_soft_mask_of_regions(tmp_path):
    (tmp_path / "m").mkdir()
    Image.fromarray(np.arange(400).reshape(20, 20).astype("uint8")).save(tmp_path / "m/1.png")
    with complaint("m/1.png", "256 grey values", "at most 32"):
        data.load_regions(f"masks:{tmp_path / 'm'}", some_photos(tmp_path), middle)


def test_find_masks_takes_the_longest_end_of_the_path(tmp_path):
    for name in ("m/0.png", "m/s/0.png", "m/1.png", "m/p/s/2.png"):
        photo(tmp_path / name)
    paths = [f"{tmp_path}/p/s/{name}" for name in ("0.jpg", "1_real.png", "1_a_b.jpg", "2.webp", "3.jpg")]

    def end(p):
        return p and p.removeprefix(f"{tmp_path}/m/")

    assert [end(p) for p in data.find_masks(paths, str(tmp_path / "m"))] == [
        "s/0.png",
        "1.png",
        None,
        "p/s/2.png",
        None,
    ]
    with complaint("--masks", tmp_path / "m", "7.jpg", "7.png"):
        data.find_masks(["q/7.jpg"], str(tmp_path / "m"))


# --- what discover.py writes


def discovery(folder, **changes):
    folder.mkdir(exist_ok=True)
    arrays = dict(
        medoids=np.eye(3, 4, dtype="float32"),
        mean=np.zeros(4, "float32"),
        kept=np.array([2, 0]),
        fingerprint="f",
        regions="grid:3",
        region_encoder="pool",
        data="scenes",
        clipped=True,
        paths=["a.png", "b.png"],
        image=np.array([0, 0, 1]),
        box=np.zeros((3, 4), "float32"),
        label=np.array([2, 0, 1]),
    )
    arrays.update(changes)
    (folder / "discovery.npz").write_bytes(data.npz(**{k: v for k, v in arrays.items() if v is not None}))
    data.write_json(folder / "discovery.json", dict(clusters=[dict(id=k, kept=k != 1) for k in (2, 0, 1)]))
    return folder


def planted_folder(root, few=4):
    """Cut-outs of three kinds and backgrounds of two, by folder and by name."""
    for kind, n in (("bear", 8), ("cat", 7), ("cup", few)):
        for k in range(n):
            cutout(root / f"foregrounds/{kind}__{k}.png", 60, (k * 20, 90, 40))
    for kind in ("forest", "sea"):
        for k in range(6):
            photo(root / f"backgrounds/{kind}/{k}.png", k)
    return f"cutouts:{root}"


def test_cutouts_go_with_an_object_or_a_scene_as_strongly_as_asked(tmp_path):
    spec, v = planted_folder(tmp_path), 0.9
    for feature, classes, places in (
        ("object", ["bear", "cat"], ["plain", "cup"]),
        ("scene=sea", None, None),
    ):
        samples = data.load_data(spec, strength=v, spurious="bear", feature=feature, seed=1)
        train = samples.split == 0
        phi = np.corrcoef((samples.y[train] == 0).numpy(), samples.place[train].numpy())[0, 1]
        assert phi == pytest.approx(v, abs=0.01) and samples.counts(2).tolist() == [50] * (
            2 * len(samples.classes)
        )
        files = [
            {i.figure.path for i, k in zip(samples.items, samples.split.tolist(), strict=False) if k == part}
            for part in range(3)
        ]
        assert not files[0] & files[1] and not files[1] & files[2] and not files[0] & files[2]
        if classes:
            assert samples.classes == classes and samples.places == places
            marks = {Path(i.mark.path).name[:3] for i in samples.items if i.mark}
            assert marks == {"cup"} and all(
                bool(i.mark) == bool(p) for i, p in zip(samples.items, samples.place.tolist(), strict=False)
            )
        else:
            sea = ["/sea/" in i.ground.path for i in samples.items]
            assert sea == samples.place.bool().tolist() and samples.shows[0][1] in (None, data.SCENE)
        assert samples.items[0].image().size == (224, 224)


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(spurious="unicorn"), ("--spurious", "unicorn", "bear")),
        (dict(feature="object=unicorn"), ("--feature", "unicorn")),
        (dict(feature="sound"), ("--feature", "sound", "scene")),
    ],
)
def test_cutouts_that_cannot_be_are_one_line(tmp_path, more, words):
    spec = planted_folder(tmp_path)
    with complaint(*words):
        data.load_data(spec, **more)


def coco_photos(root, n=200):
    """COCO with cats and dogs, and with a cup in every second photo; one crowd, one photo of both."""
    kinds = [dict(id=k, name=name) for k, name in ((1, "cat"), (2, "dog"), (3, "cup"))]
    images, notes = [], []
    for k in range(4 * n):
        images.append(dict(id=k, file_name=f"{k}.jpg", width=16, height=12))
        for c in ((1 + k % 2), *((3,) if k % 4 < 2 else ())):
            notes.append(dict(image_id=k, category_id=c, bbox=[4, 3, 8, 6], iscrowd=int(k == 8 and c == 1)))
    notes.append(dict(image_id=12, category_id=2, bbox=[0, 0, 4, 3]))
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for image in images:
        (root / "train2017" / image["file_name"]).touch()
    tree = dict(images=images, categories=kinds, annotations=notes)
    (root / "annotations/instances_train2017.json").write_text(json.dumps(tree))
    return f"coco:{root}"


def test_coco_reaches_the_correlation_with_the_same_test_photos_for_every_seed(tmp_path):
    spec, named = coco_photos(tmp_path), dict(classes="cat,dog", feature="cup")
    one, other = (
        data.load_data(spec, strength=0.8, spurious=c, seed=s, **named) for c, s in (("cat", 0), ("1", 5))
    )
    train = one.split == 0
    phi = np.corrcoef((one.y[train] == 0).numpy(), one.place[train].numpy())[0, 1]
    assert (
        phi == pytest.approx(0.8, abs=0.05)
        and one.classes == ["cat", "dog"]
        and one.places == ["no cup", "cup"]
    )
    held = [{i.path for i, k in zip(s.items, s.split.tolist(), strict=False) if k == 2} for s in (one, other)]
    assert held[0] == held[1] and not any(path.endswith(("/8.jpg", "/12.jpg")) for path in held[0])
    assert {shows[0] for shows in one.shows} == {((0.25, 0.25, 0.75, 0.75),)}


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(classes="cat,unicorn", feature="cup"), ("--classes", "unicorn")),
        (dict(classes="cat", feature="cup"), ("--classes",)),
        (dict(classes="cat,dog", feature="dog"), ("--feature", "dog")),
        (dict(classes="cat,dog"), ("--feature",)),
    ],
)
def test_coco_that_cannot_be_is_one_line(tmp_path, more, words):
    spec = coco_photos(tmp_path)
    with complaint(*words):
        data.load_data(spec, **more)


def test_a_file_of_another_kind_named_as_a_picture_starts_no_program(tmp_path, monkeypatch):
    gs = tmp_path / "bin/gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\nshowpage\n")
    with complaint(path, "not a picture"):
        data.open_image(str(path))
    with complaint(path, "not a picture"):
        data.picture_size(data.Photo(str(path)))
    assert not (tmp_path / "ran").exists()


def test_a_photo_is_no_mask_of_itself(tmp_path):
    paths = [photo(tmp_path / f"a/b/{k}.png", k) for k in range(2)]
    with complaint("no mask for any image"):
        data.find_masks(paths, tmp_path)
