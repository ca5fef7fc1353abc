import io
import json
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from metainfluence.lab.data import _images as images
from metainfluence.lab.data import _prepared as prepared
from metainfluence.lab.data import cifar_fs, datasets, fc100, fewshot, mini_imagenet, mnist, omniglot
from metainfluence.lab.data.datasets import Dataset


def png(picture):
    out = io.BytesIO()
    picture.save(out, "PNG")
    out.seek(0)
    return out


def prepare(root, name, version, features, splits):
    """Writes a dataset as `tfds build --file_format=array_record` does: split -> examples."""
    folder = root / name / version
    folder.mkdir(parents=True)
    kinds = tfds.features.FeaturesDict(features)
    kinds.save_config(str(folder))
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": []}
    for split, examples in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for example in examples:
            writer.write(kinds.serialize_example(kinds.encode_example(example)))
        writer.close()
        path = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info["splits"].append({"name": split, "shardLengths": [str(len(examples))], "filepathTemplate": path})
    (folder / "dataset_info.json").write_text(json.dumps(info))


def omniglot_features():
    return {
        "image": tfds.features.Image(shape=(105, 105, 3)),
        "alphabet": tfds.features.ClassLabel(num_classes=50),
        "alphabet_char_id": np.int64,
        "label": tfds.features.ClassLabel(num_classes=1623),
    }


def drawing(alphabet, character, mode):
    """A drawing whose left half is ink: black on white, as a PNG of one bit, with a palette, in grey or in colour."""
    picture = Image.new("L", (105, 105), 255)
    picture.paste(0, (0, 0, 52, 105))
    example = {"alphabet": alphabet, "alphabet_char_id": character, "label": 20 * alphabet + character}
    return {"image": png(picture.convert(mode)), **example}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Alphabets 0 and 1 to train; 1 again, and 2, in the other split."""
    root = tmp_path_factory.mktemp("tfds")
    splits = {
        "small1": [drawing(a, c, mode) for a in (0, 1) for c in (0, 1) for mode in ("1", "L")],
        "small2": [drawing(a, c, mode) for a in (1, 2) for c in (0, 1) for mode in ("P", "RGB")],
    }
    prepare(root, "omniglot", "3.0.0", omniglot_features(), splits)
    return root


def test_ink_fills_the_range_whatever_the_png_looks_like(drawings):
    """TFDS itself decodes PNGs of one bit to 0 and 1, or to 0 and 255 where OpenCV is installed."""
    for split in ("small1", "small2"):
        read = omniglot.characters(split, root=drawings)
        assert read.images.shape == (8, 28, 28)
        assert read.images.dtype == np.float32
        np.testing.assert_array_equal(read.images[:, :, :13], 1)
        np.testing.assert_array_equal(read.images[:, :, 14:], 0)


def test_omniglot_is_tested_on_new_alphabets_only(drawings):
    read = omniglot.dataset(root=drawings)
    assert {split: len(pool) for split, pool in read.pools.items()} == {"train": 8, "test": 4}
    assert read.class_names == ("0_0", "0_1", "1_0", "1_1", "2_0", "2_1")
    np.testing.assert_array_equal(read.labels, np.repeat(np.arange(6), 2))


def test_the_split_that_leaks_is_caught(drawings):
    train, test = (omniglot.characters(split, root=drawings) for split in ("small1", "small2"))
    with pytest.raises(ValueError, match="'train' and 'test' to share no alphabets, got 1 in both: alphabet 1"):
        omniglot.join(train, test)


@pytest.fixture(scope="module")
def real_omniglot():
    try:
        return datasets.load("omniglot")
    except FileNotFoundError:
        pytest.skip("Omniglot is not prepared")


def test_real_omniglot(real_omniglot):
    read = real_omniglot
    assert read.images.shape == (4840, 28, 28)
    assert len(read.class_names) == 242
    np.testing.assert_array_equal(np.bincount(read.labels), 20)
    assert (read.images.min(), read.images.max()) == (0, 1)
    assert 0.05 < read.images.mean() < 0.12
    assert (len(read.pools["train"]), len(read.pools["test"])) == (2720, 2120)
    train, test = (omniglot.characters(split) for split in ("small1", "small2"))
    with pytest.raises(ValueError, match="to share no alphabets, got 2 in both"):
        omniglot.join(train, test)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Two images of every class, whose first channel is the label; superclasses as in CIFAR-100's own numbering."""
    root = tmp_path_factory.mktemp("tfds")
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=cifar_fs.CLASS_NAMES),
        "coarse_label": tfds.features.ClassLabel(num_classes=20),
    }

    def example(label):
        image = png(Image.new("RGB", (32, 32), (label, 255, 0)))
        return {"image": image, "label": label, "coarse_label": label % 20}

    rows = [example(label) for label in range(100)]
    prepare(root, "cifar100", "3.0.2", features, {"train": rows, "test": [example(label) for label in range(100)]})
    return root


def test_cifar_fs_is_the_published_split(cifar):
    read = datasets.load("cifar_fs", root=cifar)
    assert read.images.shape == (200, 32, 32, 3)
    np.testing.assert_array_equal(np.round(read.images[:, 0, 0, 0] * 255), read.labels)
    names = {split: {read.class_names[label] for label in read.labels[pool]} for split, pool in read.pools.items()}
    assert {split: len(found) for split, found in names.items()} == {"train": 64, "val": 16, "test": 20}
    assert {"apple", "tank", "turtle"} < names["train"]
    assert {"otter", "tractor", "sea"} < names["val"]
    assert {"baby", "worm", "rocket"} < names["test"]
    assert len(set(cifar_fs.CLASS_NAMES)) == 100
    assert list(cifar_fs.CLASS_NAMES) == sorted(cifar_fs.CLASS_NAMES)


def test_fc100_is_the_published_split(cifar):
    read = datasets.load("fc100", root=cifar, size=16)
    assert read.images.shape == (200, 16, 16, 3)
    superclasses = {
        split: {fc100.SUPERCLASSES[k % 20] for k in read.labels[pool]} for split, pool in read.pools.items()
    }
    assert superclasses["test"] == {"aquatic_mammals", "insects", "medium_mammals", "people"}
    assert superclasses["val"] == {
        "large_carnivores",
        "large_omnivores_and_herbivores",
        "non-insect_invertebrates",
        "small_mammals",
    }
    assert {split: len(pool) for split, pool in read.pools.items()} == {"train": 120, "val": 40, "test": 40}
    assert list(fc100.SUPERCLASSES) == sorted(fc100.SUPERCLASSES)


def test_class_names_that_are_not_cifars(tmp_path):
    features = {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(names=["cat"])}
    prepare(
        tmp_path, "cifar100", "3.0.2", features, {"train": [{"image": png(Image.new("RGB", (32, 32))), "label": 0}]}
    )
    with pytest.raises(ValueError, match="cifar100: expected the class names of CIFAR-100, got cat"):
        datasets.load("cifar_fs", root=tmp_path)


def test_mnist_takes_the_splits_that_are_prepared(tmp_path):
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    rows = [{"image": png(Image.new("L", (28, 28), 10 * k)), "label": k % 10} for k in range(20)]
    prepare(tmp_path, "mnist", "3.0.1", features, {"test": rows})
    read = mnist.dataset(root=tmp_path)
    assert read.images.shape == (20, 28, 28)
    np.testing.assert_allclose(read.images[:, 0, 0], np.arange(0, 200, 10) / 255, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(read.pools.values()))), np.arange(20))
    np.testing.assert_array_equal(np.sort(read.labels[read.pools["train"]]), np.arange(10))


def test_a_prepared_image_that_cannot_be_read_is_named(tmp_path):
    features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": np.int64}
    pictures = {
        "dull": (Image.new("LA", (4, 4), (9, 9)), "without transparency"),
        "tall": (Image.new("L", (4, 6)), "4, 4"),
    }
    for name, (picture, said) in pictures.items():
        rows = [{"image": png(each), "label": 0} for each in (Image.new("L", (4, 4)), picture)]
        prepare(tmp_path, name, "1.0.0", features, {"train": rows})
        source = prepared.builder(name, tmp_path)
        with pytest.raises(ValueError, match=f"{name}, split train, example 1: expected .*{said}"):
            prepared.columns(source, "train", ("label",), size=None, mode="L")


def test_the_newest_version_is_read_and_an_unknown_split_named(drawings, tmp_path):
    for version in ("3.0.10", "3.0.9"):
        prepare(tmp_path, "omniglot", version, omniglot_features(), {"small1": [drawing(0, 0, "1")]})
    source = prepared.builder("omniglot", tmp_path)
    assert str(source.info.version) == "3.0.10"
    with pytest.raises(ValueError, match="split: expected one of small1, which are prepared of omniglot, got 'test'"):
        omniglot.characters("test", root=tmp_path)


@pytest.mark.parametrize(("name", "tfds_name"), [("omniglot", "omniglot"), ("mnist", "mnist"), ("fc100", "cifar100")])
def test_what_is_not_prepared_comes_with_the_command(name, tfds_name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"tfds build {tfds_name} --file_format=array_record"):
        datasets.load(name)


def test_tensorflow_stays_out(drawings):
    program = (
        "import sys; from metainfluence.lab.data import datasets\n"
        "print(len(datasets.load('omniglot', root=sys.argv[1]).labels), 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(drawings)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["12", "False"]


def test_digits_and_their_sizes():
    read = datasets.load("digits")
    assert read.images.shape == (1797, 8, 8)
    assert read.images.dtype == np.float32
    assert not set(read.pools["train"]) & set(read.pools["test"])
    small = datasets.load("digits", size=4)
    blocks = read.images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(small.images, blocks, atol=1e-6)
    assert datasets.load("digits", size=16).images.shape == (1797, 16, 16)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"name: expected one of digits, .*, got 'omniglt'; nearest is 'omniglot'"):
        datasets.load("omniglt")


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="size: expected None or a positive integer"):
        datasets.load("digits", size=size)


def small_dataset(name="small", channels=()):
    rng = np.random.default_rng(0)
    shape = (8, 4, 4, *channels)
    pools = {"train": np.arange(4), "test": np.arange(4, 8)}
    return Dataset(name, rng.random(shape).astype(np.float32), np.repeat(np.arange(4), 2), ("a", "b", "c", "d"), pools)


def test_rotations_are_further_classes():
    read = small_dataset()
    turned = datasets.with_rotations(read)
    assert turned.images.shape == (8 + 3 * 4, 4, 4)
    assert turned.class_names[4:] == (
        "a turned 90°",
        "b turned 90°",
        *(f"{c} turned {t}°" for t in (180, 270) for c in "ab"),
    )
    np.testing.assert_array_equal(turned.pools["test"], read.pools["test"])
    np.testing.assert_array_equal(turned.pools["train"], [0, 1, 2, 3, *range(8, 20)])
    for k in turned.pools["train"][4:]:
        turns, source = divmod(k - 8, 4)
        np.testing.assert_array_equal(turned.images[k], np.rot90(read.images[source], turns + 1))
        name = f"{'ab'[read.labels[source]]} turned {90 * (turns + 1)}°"
        assert turned.class_names[turned.labels[k]] == name
    datasets.check_pools(turned.labels, turned.pools, turned.class_names)
    with pytest.raises(ValueError, match="split: expected one of train, test of small, got 'val'"):
        datasets.with_rotations(read, ["val"])
    with pytest.raises(ValueError, match=r"share no classes, got 10 in both: 0, 1, .*, 9$"):
        datasets.with_rotations(datasets.load("digits"))


def test_mirrored_classes_are_turned_like_the_others():
    read = small_dataset()
    both = datasets.with_mirrors(read)
    assert both.class_names[4:] == ("a mirrored", "b mirrored")
    np.testing.assert_array_equal(both.pools["train"], [0, 1, 2, 3, *range(8, 12)])
    np.testing.assert_array_equal(both.pools["test"], read.pools["test"])
    np.testing.assert_array_equal(both.images[8:], np.flip(read.images[:4], axis=2))
    np.testing.assert_array_equal(both.labels[8:], 4 + read.labels[:4])
    # All eight ways in which a square can lie, each a class of its own.
    turned = datasets.with_rotations(both)
    lying = {image.tobytes() for image in turned.images[turned.pools["train"]]}
    assert len(lying) == len(turned.pools["train"]) == 8 * 4
    assert len(np.unique(turned.labels[turned.pools["train"]])) == 8 * 2
    with pytest.raises(ValueError, match="split: expected one of train, test of small, got 'val'"):
        datasets.with_mirrors(read, ["val"])


def test_distortions_are_further_examples_of_their_class():
    blob = np.zeros((20, 20))
    blob[6:14, 8:11] = 1
    images = np.stack([blob, blob.T, np.zeros_like(blob)]).astype(np.float32)
    pools = {"train": np.array([0, 1]), "test": np.array([2])}
    read = Dataset("blobs", images, np.arange(3), ("upright", "flat", "none"), pools)
    more = datasets.with_distortions(read, copies=3)
    assert more.labels.tolist() == [0, 1, 2, 0, 0, 0, 1, 1, 1]
    assert more.pools["train"].tolist() == [0, 1, *range(3, 9)]
    assert more.pools["test"].tolist() == [2]
    np.testing.assert_array_equal(more.images[:3], images)
    rows, columns = np.indices((20, 20)) - 9.5
    for k in range(3, 9):
        image = more.images[k] / more.images[k].sum()
        assert not np.array_equal(more.images[k], images[more.labels[k]])
        assert 0.6 * 24 < more.images[k].sum() < 1.5 * 24
        centre = (image * rows).sum(), (image * columns).sum()
        assert np.abs(centre).max() < 3
        spread = (image * (rows - centre[0]) ** 2).sum(), (image * (columns - centre[1]) ** 2).sum()
        # Turned and sheared, it still lies the way it lay.
        assert (spread[0] > 1.5 * spread[1]) == (more.labels[k] == 0)
    again = datasets.with_distortions(read, copies=3)
    np.testing.assert_array_equal(again.images, more.images)
    with pytest.raises(ValueError, match="dataset: expected images in grey"):
        datasets.with_distortions(small_dataset("colour", (3,)))


@pytest.mark.parametrize("colour", [(), (3,)])
def test_crops_are_further_examples_of_their_class(colour):
    # Brighter downwards and to the right, by other steps, so that a part tells its place, its size and its side.
    rows, columns = np.indices((24, 24)) / 24
    ramp = (rows / 2 + columns / 4).reshape(24, 24, *(1 for _ in colour)) * np.ones(colour)
    images = np.stack([ramp, 1 - ramp, ramp]).astype(np.float32)
    pools = {"train": np.array([0, 1]), "test": np.array([2])}
    read = Dataset("ramps", images, np.arange(3), ("down", "up", "none"), pools)
    more = datasets.with_crops(read, copies=8, size=16)
    assert more.images.shape == (3 + 16, 16, 16, *colour)
    assert more.labels.tolist() == [0, 1, 2, *[0] * 8, *[1] * 8]
    assert more.pools["train"].tolist() == [0, 1, *range(3, 19)]
    assert more.pools["test"].tolist() == [2]
    np.testing.assert_allclose(more.images[:3], datasets.resized(images, 16))
    down, right = (np.ptp(more.images[3:].mean(axis=axis), axis=1) for axis in (2, 1))
    assert np.all(more.images[3:11, 0, 8] < more.images[3:11, -1, 8])
    assert np.all(more.images[11:, 0, 8] > more.images[11:, -1, 8])
    # Windows of half the area or more: no side below 0.61; and none is the whole.
    assert np.all((down > 0.25) & (down < 0.49))
    assert np.all((right > 0.125) & (right < 0.245))
    mirrored = more.images[3:11, 8, 0] > more.images[3:11, 8, -1]
    assert 0 < mirrored.reshape(8, -1)[:, 0].sum() < 8
    np.testing.assert_array_equal(datasets.with_crops(read, copies=8, size=16).images, more.images)
    with pytest.raises(ValueError, match="dataset: expected square images, got 24 x 20"):
        datasets.with_crops(read._replace(images=images[:, :, :20]))


@pytest.mark.parametrize(("own", "other"), [((), (3,)), ((3,), ())])
def test_foreign_examples_take_the_shape_of_the_dataset(own, other):
    both = datasets.add_foreign(small_dataset("own", own), small_dataset("other", other)._replace())
    assert both.images.shape == (16, 4, 4, *own)
    assert list(both.pools) == ["train", "test", "other/train", "other/test"]
    np.testing.assert_array_equal(both.pools["other/test"], np.arange(12, 16))
    assert both.class_names[both.labels[15]] == "other/d"
    expected = small_dataset("other", other).images[3]
    got = both.images[11]
    np.testing.assert_allclose(got.mean(-1) if own else got, expected if own else expected.mean(-1), rtol=1e-6)


def test_classes_by_name_are_checked():
    labels, names = np.array([0, 0, 1]), ("cat", "dog")
    with pytest.raises(ValueError, match="splits: expected names of classes, got cow"):
        datasets.by_class(labels, names, {"train": ["cow"]})
    with pytest.raises(ValueError, match="'train' and 'test' to share no classes, got 1 in both: cat"):
        datasets.by_class(labels, names, {"train": ["cat"], "test": ["dog", "cat"]})


@pytest.fixture
def folder(tmp_path):
    """split/class/image, ten by twelve pixels; a JPEG among PNGs."""
    for split, name in (("train", "ant"), ("train", "bee"), ("test", "cow")):
        (tmp_path / split / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (10, 12), (255, 51 * k, 0)).save(tmp_path / split / name / f"{k}.png")
    Image.new("L", (10, 12), 128).save(tmp_path / "train" / "ant" / "2.JPG", "JPEG")
    return tmp_path


def test_image_folder(folder):
    read = datasets.image_folder(folder, size=6)
    assert read.images.shape == (7, 6, 6, 3)
    assert read.class_names == ("ant", "bee", "cow")
    assert {split: pool.tolist() for split, pool in read.pools.items()} == {"test": [0, 1], "train": [2, 3, 4, 5, 6]}
    assert read.labels.tolist() == [2, 2, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(read.images[3, 0, 0], [1, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(read.images[4], 128 / 255, atol=0.01)
    assert datasets.image_folder(folder, size=6, color=False).images.shape == (7, 6, 6)
    tasks = fewshot.sample(read, "train", num_tasks=1, ways=2, shots=1, queries=1, seed=0)
    assert set(tasks.classes[0]) == {0, 1}


def corrupt(folder):
    path = folder / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:45])
    return r"0\.png: expected a readable JPEG or PNG image"


def no_image(folder):
    (folder / "train" / "ant" / "0.png").write_text("not an image")
    return r"0\.png: expected a readable JPEG or PNG image, got 12 bytes"


def other_kind(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("notes")
    return r"notes\.txt: expected an image, a file that ends in"


def disguised(folder):
    """A format that was not asked for, under a name that was."""
    Image.new("RGB", (4, 4)).save(folder / "train" / "ant" / "0.png", "GIF")
    return r"0\.png: expected a readable JPEG or PNG image"


def link_outside(folder):
    outside = folder.parent / "outside.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "train" / "ant" / "9.png").symlink_to(outside)
    return r"9\.png: expected a file inside of .*, got a link to .*outside\.png"


def linked_folder(folder):
    outside = folder.parent / "elsewhere"
    (outside / "dog").mkdir(parents=True)
    (folder / "val").symlink_to(outside)
    return r"val: expected a file inside of .*, got a link to .*elsewhere"


def empty_class(folder):
    (folder / "train" / "dog").mkdir()
    return "dog: expected images, got an empty folder"


def file_for_a_split(folder):
    (folder / "README").write_text("x")
    return "README: expected a folder"


def class_in_two_splits(folder):
    (folder / "train" / "ant").rename(folder / "train" / "cow")
    return "pools: expected 'test' and 'train' to share no classes, got 1 in both: cow"


def class_spelt_in_two_ways(folder):
    (folder / "train" / "ant").rename(folder / "train" / "caf\u00e9")
    (folder / "test" / "cow").rename(folder / "test" / "cafe\u0301")
    return "pools: expected 'test' and 'train' to share no classes, got 1 in both: caf\u00e9"


def image_in_two_splits(folder):
    (folder / "train" / "bee" / "9.png").symlink_to(folder / "test" / "cow" / "0.png")
    return r"pools: expected 'test' and 'train' to share no files, got 1 in both: .*cow/0\.png"


@pytest.mark.parametrize(
    "damage",
    [
        corrupt,
        no_image,
        other_kind,
        disguised,
        link_outside,
        linked_folder,
        empty_class,
        file_for_a_split,
        class_in_two_splits,
        class_spelt_in_two_ways,
        image_in_two_splits,
    ],
)
def test_a_folder_that_is_not_what_it_should_be(folder, damage):
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        datasets.image_folder(folder, size=6)


def test_links_inside_of_the_folder_are_fine(folder):
    (folder / "train" / "bee" / "9.png").symlink_to(folder / "train" / "bee" / "0.png")
    assert len(datasets.image_folder(folder, size=6).labels) == 8


def test_a_bomb_is_refused_by_its_header(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"0\.png: expected an image of reasonable size, got one that Pillow refuses"):
        datasets.image_folder(folder, size=6)


def test_images_that_do_not_fit_are_refused_before_any_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(datasets, "decode_file", lambda *args, **options: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"size: expected images that fit into .* GiB of memory, got 7 of 1000000 x"):
        datasets.image_folder(folder, size=1_000_000)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder laid out as split/class"):
        datasets.image_folder(tmp_path / "nowhere", size=6)


def test_grey_images_with_a_palette_or_one_bit_are_in_range():
    half = Image.new("L", (4, 4), 255)
    half.paste(0, (0, 0, 2, 4))
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA"):
        got = images.decode(png(half.convert(mode)).getvalue(), size=None, mode="L")
        np.testing.assert_array_equal(got, np.tile([0, 0, 1, 1], (4, 1)))


def test_mini_imagenet_needs_its_folder_and_its_classes(folder, monkeypatch):
    monkeypatch.delenv(mini_imagenet.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="METAINFLUENCE_MINI_IMAGENET to name its folder"):
        datasets.load("mini_imagenet")
    monkeypatch.setenv(mini_imagenet.VARIABLE, str(folder))
    with pytest.raises(ValueError, match=r"expected the classes of mini-ImageNet's splits, .*'train': 64.*, got"):
        datasets.load("mini_imagenet", size=8)


def test_mini_imagenet_is_64_16_20(tmp_path):
    picture = png(Image.new("RGB", (84, 84), (255, 0, 0))).getvalue()
    for split, count in mini_imagenet.NUM_CLASSES.items():
        for k in range(count):
            path = tmp_path / split / f"n{split}{k:02}"
            path.mkdir(parents=True)
            (path / "0.png").write_bytes(picture)
    read = datasets.load("mini_imagenet", root=tmp_path)
    assert read.images.shape == (100, 84, 84, 3)
    assert {split: len(pool) for split, pool in read.pools.items()} == mini_imagenet.NUM_CLASSES


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_16_bits_of_grey_keep_their_range(tmp_path):
    ramp = np.arange(64 * 64).reshape(64, 64) * 16
    for split in ("train", "test"):
        (tmp_path / split / f"class of {split}").mkdir(parents=True)
        (tmp_path / split / f"class of {split}" / "ramp.png").write_bytes(
            encoded(Image.fromarray(ramp.astype(np.uint16)))
        )
    for color in (False, True):
        read = datasets.image_folder(tmp_path, size=64, color=color).images[0]
        assert read.mean() == pytest.approx(0.5, abs=1e-3)
        assert len(np.unique(read)) == 256
        np.testing.assert_allclose(read[..., 0] if color else read, ramp / 65535, atol=0.5 / 255 + 1e-6)


def packed_png(row, width, bits, colour, *further):
    """A PNG of one row as its bytes are given, for what Pillow reads and does not write."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *further, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey_fill_the_range(bits):
    levels = 2**bits
    row = sum(value << bits * (levels - 1 - value) for value in range(levels)).to_bytes(max(bits * levels // 8, 1))
    if bits == 1:
        row = bytes([0b01000000])
    got = images.decode(packed_png(row, levels, bits, 0), size=None, mode="L")
    np.testing.assert_allclose(got[0], np.arange(levels) / (levels - 1), atol=1 / 255)


# The kinds of PNG by their standard: channels of each colour type.
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", CHANNELS)
def test_every_kind_of_png_is_read_or_refused_for_its_transparency(colour, bits, rng):
    most = 2**bits - 1
    pixels = np.round(rng.uniform(size=(5, CHANNELS[colour])) * most)
    pixels[0], pixels[1] = 0, most
    if colour in (4, 6):
        pixels[:, -1] = most
    weights = [0.299, 0.587, 0.114] if colour in (2, 6) else [1.0]
    kind = np.dtype(f">u{bits // 8}")
    got = images.decode(packed_png(pixels.astype(kind).tobytes(), 5, bits, colour), size=None, mode="L")
    np.testing.assert_allclose(got[0], pixels[:, : len(weights)] @ weights / most, atol=1.5 / 255)
    further = ()
    if colour in (4, 6):
        pixels[2, -1] = most // 2
    else:
        # One colour that means nothing is there.
        further = ((b"tRNS", np.full(CHANNELS[colour], most, ">u2").tobytes()),)
    content = packed_png(pixels.astype(kind).tobytes(), 5, bits, colour, *further)
    with pytest.raises(ValueError, match="expected an image without transparency, got 20% of its pixels transparent"):
        images.decode(content, size=None, mode="L")


def test_pixels_of_no_colour_are_refused():
    palette = (b"PLTE", bytes([255, 0, 0, 0, 255, 0]))
    opaque = (b"tRNS", bytes([255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = images.decode(packed_png(bytes([0, 1, 1]), 3, 8, 3, palette, opaque), size=None, mode="RGB")
    np.testing.assert_array_equal(got[0], [[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    with pytest.raises(ValueError, match="expected pixels of the palette's 2 colours, got number 2"):
        images.decode(packed_png(bytes([0, 1, 2]), 3, 8, 3, palette), size=None, mode="RGB")


def test_an_animation_is_refused_by_name_and_a_photograph_with_a_preview_is_not(tmp_path):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    path = tmp_path / "moving.png"
    path.write_bytes(encoded(first, save_all=True, append_images=[second]))
    with pytest.raises(ValueError, match=r"moving\.png: expected a single picture, got an animation of 2"):
        images.decode_file(path, size=4, mode="RGB")
    photograph = encoded(first, "MPO", save_all=True, append_images=[second])
    got = images.decode(photograph, size=4, mode="RGB")
    np.testing.assert_allclose(got, np.tile([1.0, 0, 0], (4, 4, 1)), atol=0.02)


def test_palettes_are_looked_up():
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 255, 255, 255])
    picture.putdata([0, 1, 2])
    np.testing.assert_array_equal(
        images.decode(encoded(picture), size=None, mode="RGB")[0], [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    )
    grey = images.decode(encoded(picture), size=None, mode="L")[0]
    np.testing.assert_allclose(grey, [0.299, 0.587, 1.0], atol=2 / 255)


def test_four_inks_become_three_colours():
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    large = Image.fromarray(np.kron(colours, np.ones((16, 16, 1), np.uint8))).convert("CMYK")
    got = images.decode(encoded(large, "JPEG", quality=100), size=2, mode="RGB")
    np.testing.assert_allclose(got, colours / 255, atol=0.1)


def test_images_are_turned_upright():
    colours = np.zeros((32, 16, 3), np.uint8)
    colours[:16] = 255
    picture = Image.fromarray(colours)
    plain = images.decode(encoded(picture, quality=95, kind="JPEG"), size=None, mode="L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture is to be turned by 90° clockwise
    turned = images.decode(encoded(picture, "JPEG", quality=95, exif=exif), size=None, mode="L")
    np.testing.assert_allclose(turned, np.rot90(plain, -1), atol=0.05)
    assert turned.shape == (16, 32)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB"])
def test_transparency_is_refused_by_name_unless_there_is_none(mode, tmp_path):
    """White on transparent would become all white."""
    drawing = np.full((4, 4, 4), 255, np.uint8)
    drawing[:2, :, 3] = 0
    options = {}
    if mode in ("P", "RGB"):
        drawing[:2, :, :3] = 7
        picture = Image.fromarray(drawing[..., :3]).convert(mode)
        options["transparency"] = int(np.asarray(picture)[0, 0]) if mode == "P" else (7, 7, 7)
    else:
        picture = Image.fromarray(drawing).convert(mode)
    path = tmp_path / "drawing.png"
    path.write_bytes(encoded(picture, **options))
    message = r"drawing\.png: expected an image without transparency, got 50% of its pixels transparent"
    with pytest.raises(ValueError, match=message):
        images.decode_file(path, size=4, mode="L")
    drawing[..., 3] = 255
    if mode in ("LA", "RGBA"):
        path.write_bytes(encoded(Image.fromarray(drawing).convert(mode)))
        np.testing.assert_array_equal(images.decode_file(path, size=4, mode="L"), np.ones((4, 4)))


def test_other_formats_are_refused_by_name(tmp_path):
    picture = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    path = tmp_path / "really_a_tiff.png"
    path.write_bytes(encoded(picture, "TIFF"))
    with pytest.raises(ValueError, match=r"really_a_tiff\.png: .* JPEG or PNG image, got \d+ bytes of another kind$"):
        images.decode_file(path, size=4, mode="L")
