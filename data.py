"""All that comes in and goes out: flags, files, images, data sets, composites, drawn scenes, tables and pages.

The three scripts share this file and model.py. What is read from outside is checked here, and a `Complaint`
names the file or flag, what was found and what to do; `run` prints it as one line and exits with code 2.
"""
import atexit, base64, contextlib, csv, difflib, errno, functools, gc, gzip, html, io, json, math, os, signal, subprocess, sys, tempfile, warnings, zipfile, zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

GREY = (124, 116, 104)  # the mean colour of ImageNet
SPLITS = ("train", "val", "test")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
WATERBIRDS_COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")


class Complaint(Exception):
    """Something that the user can mend: one line that names it, says what was found and what to do."""


def run(main, again="the same command with --resume"):
    """main(), with one line and exit code 2 for what the user can mend, and 130 for Ctrl-C; again: what goes on after that."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except Complaint as problem:
        sys.exit(os.environ.get("RANK", "0") == "0" and print(f"{script}: {problem}", file=sys.stderr) or 2)
    except OSError as problem:  # a full disk, a folder that may not be written, a file that went away
        sys.exit(print(f"{script}: {problem.filename or 'file system'}: {problem.strerror or problem}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; {again} goes on from here", file=sys.stderr)
        sys.exit(130)


def say(text):
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# flags

def flags(script, argv=None):
    """Overrides the defaults on a script's first screen by --key=value, in place.

    script: the script's globals(); every lower-case bool, int, float or str in it is a flag, and its value the default.
    argv: list of words, sys.argv[1:] if None. A bool may stand without a value; --help prints the block and exits.
    Returns dict flag -> value. Raises Complaint for an unknown flag or a value of the wrong type.
    """
    config = {k: v for k, v in script.items() if k[0].islower() and type(v) in (bool, int, float, str)}
    for word in sys.argv[1:] if argv is None else argv:
        if word in ("--help", "-h"):
            source = Path(script["__file__"]).read_text()
            print(script["__doc__"].strip() + "\n\nFlags (--key=value) and their defaults:\n")
            print(source[source.index("\n# ---"):source.index("\n# --- end")].strip())
            sys.exit(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise Complaint(f"{word}: found a bare word, expected --key=value; --help lists the flags")
        if key not in config:
            raise Complaint(f"--{key}: no such flag; {near(key, config)}")
        kind = type(config[key])
        if kind is bool:
            if value.lower() not in ("true", "false", "1", "0") and equals:
                raise Complaint(f"--{key}: found {value!r}, expected True or False")
            config[key] = value.lower() in ("true", "1") or not equals
        else:
            try:
                config[key] = kind(value)
            except ValueError:
                raise Complaint(f"--{key}: found {value!r}, expected {'a whole number' if kind is int else 'a number'}") from None
            if kind is float and math.isnan(config[key]) or kind is str and not equals:
                raise Complaint(f"--{key}: found {value!r}, expected --{key}=VALUE")
    script.update(config)
    if "out_dir" in config:  # complains now, not after the work
        at = next(p for p in (Path(config["out_dir"]).absolute(), *Path(config["out_dir"]).absolute().parents) if os.path.exists(p))
        if not at.is_dir() or not os.access(at, os.W_OK):
            raise Complaint(f"--out_dir={config['out_dir']}: {at} {'may not be written to' if at.is_dir() else 'is not a folder'}; choose another folder")
    return config


@contextlib.contextmanager
def until_asked():
    """Ctrl-C waits for the end of a step: gives a list that is no longer empty then. A second Ctrl-C stops at once."""
    asked = []

    def ask(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("stopping at the end of this step; Ctrl-C once more stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def near(word, known):
    """'did you mean ...' for a mistyped word, or the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 5, .5)
    return "did you mean " + ", ".join(close) + "?" if close else "there are " + ", ".join(sorted(known)[:40])


def expect(holds, flag, found, wanted):
    """Raises Complaint for a flag outside its range."""
    if not holds:
        raise Complaint(f"--{flag}: found {found!r}, expected {wanted}")


def revision():
    """The git revision of this checkout, with + if files differ from it; None outside one."""
    git = lambda *words: subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
        return head.stdout.strip() + "+" * bool(git("status", "--porcelain").stdout.strip()) if head.returncode == 0 else None
    except OSError:
        return None


def rng(seed, purpose, *index):
    """A generator of its own for each (seed, purpose, index): any order of use, any sharding draws the same."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *index])


# ---------------------------------------------------------------------------------------------------------------------
# files

def write(path, content):
    """Writes str or bytes whole or not at all: a temporary file beside it, fsync, rename."""
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Complaint(f"{path}: cannot be written ({problem.strerror}); "
                        + ("free some space on that disk" if full else "choose another folder, or allow writing there")) from None


def npz(**arrays):
    """The bytes of an .npz file of plain arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: np.asarray(v) for k, v in arrays.items()})
    return buffer.getvalue()


def write_json(path, tree):
    write(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def folder(path, flag):
    """The directory that a flag names."""
    if not Path(path).is_dir():
        raise Complaint(f"--{flag}: {path}: " + ("not a folder" if Path(path).exists() else "no such folder"))
    return Path(path)


def pictures(path, flag):
    """Sorted image files below a folder; hidden ones are passed over."""
    root = folder(path, flag)
    found = image_files(root)
    if not found:
        raise Complaint(f"--{flag}: {path}: no images in it or below (looked for {' '.join(sorted(EXTENSIONS))})")
    return [root.joinpath(*parts) for parts in found]


def image_files(root):
    """Sorted paths of the images below a folder, each a tuple of its parts; hidden files and folders are passed over, links to
    folders followed, but for those that lead back to where they come from. Raises Complaint for a link to nothing."""
    found, folders = [], [((), (os.path.realpath(root),))]
    while folders:
        parts, above = folders.pop()
        with os.scandir(os.path.join(root, *parts)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in above:
                        folders.append(((*parts, entry.name), (*above, real)))
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        raise Complaint(f"{entry.path}: a link to {os.readlink(entry.path)}, which does not exist; bring it back or remove the link")
                    found.append((*parts, entry.name))
    return sorted(found)


def open_image(path):
    """An image file -> PIL image, 8-bit RGB, or RGBA if it has transparency.

    EXIF rotation is applied; CMYK, grey and palette images are converted, 16-bit ones scaled; of an animation the first
    frame counts. Raises Complaint if it is missing, empty, truncated, not an image, or below 8x8 pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            if min(image.size) < 8:
                raise Complaint(f"{path}: {image.width}x{image.height} pixels, expected at least 8x8; remove it or use --skip_bad=True")
            image.load()
    except FileNotFoundError:
        raise Complaint(f"{path}: no such file") from None
    except UnidentifiedImageError:
        size = os.path.getsize(path)
        raise Complaint(f"{path}: {'an empty file' if not size else 'not an image'}, expected a picture; replace it or use --skip_bad=True") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning, zlib.error) as problem:
        raise Complaint(f"{path}: cannot be decoded ({problem}); replace it or use --skip_bad=True") from None
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        a = np.asarray(image, np.float32)
        unit = image.mode == "F" and a.max() <= 1  # floats from 0 to 1
        image = Image.fromarray((a * 255 if unit else a / 257 if a.max() > 255 else a).clip(0, 255).astype(np.uint8))
    clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if clear else "RGB")


def open_mask(path):
    """A foreground mask -> PIL image, "L", 255 on the foreground. Raises Complaint where it is not white on black."""
    mask = open_image(path).convert("L")
    if 0 < mask.getextrema()[1] < 128:
        raise Complaint(f"{path}: its largest value is {mask.getextrema()[1]}, expected a mask, 255 on the foreground and 0 elsewhere; scale it")
    return mask


def opaque(image):
    """RGBA -> RGB on white."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# pictures: a photo, a layer, or layers put together; each has .image() -> PIL and .key() -> str, the cache's key

@dataclass(frozen=True)
class Photo:
    path: str

    def image(self):
        return opaque(open_image(self.path))

    def key(self):
        at = os.stat(self.path)
        return f"{os.path.abspath(self.path)}|{at.st_size}|{at.st_mtime_ns}"


@dataclass(frozen=True)
class Background(Photo):
    """A photo as a background: kept in memory at no more than 512 pixels."""

    def image(self):
        return small(self.path, False)


@dataclass(frozen=True)
class Cutout(Photo):
    """A foreground with its alpha, cropped to what is visible."""

    def image(self):
        return small(self.path, True)


@functools.lru_cache(2048)
def small(path, cutout):
    image = open_image(path)
    if cutout:
        box = image.mode == "RGBA" and image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
        if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
            raise Complaint(f"{path}: no transparency, expected a cut-out (RGBA, alpha 0 around the foreground); "
                            "cut it out, move it away, or use --skip_bad=True")
        if not box or min(box[2] - box[0], box[3] - box[1]) < 8:
            raise Complaint(f"{path}: nothing visible in it, expected a cut-out of at least 8x8 pixels; move it away or use --skip_bad=True")
        image = image.crop(box)
    else:
        image = opaque(image)
    image.thumbnail((512, 512), Image.BICUBIC, reducing_gap=2)
    return image


@dataclass(frozen=True)
class Masked:
    """The foreground of a photo, by its mask, in the photo's own frame."""
    photo: str
    mask: str

    def image(self):
        image, mask = Photo(self.photo).image(), open_mask(self.mask)
        if mask.size != image.size:
            raise Complaint(f"{self.mask}: {mask.width}x{mask.height} pixels, the photo {self.photo} has {image.width}x{image.height}")
        image.putalpha(mask)
        return image

    def key(self):
        return f"{Photo(self.photo).key()}|{Photo(self.mask).key()}"


@dataclass(frozen=True)
class Cut:
    """The foreground of a picture by a soft mask that model.py's cutter found, in the picture's own frame.

    alpha: h x w bytes over the box (left, top, right, bottom), in shares of width and height; nothing outside it.
    """
    picture: object
    alpha: bytes
    shape: tuple
    box: tuple = (0., 0., 1., 1.)

    def image(self):
        image = self.picture.image()
        left, top, right, bottom = (round(v * n) for v, n in zip(self.box, image.size * 2))
        mask = Image.new("L", image.size)
        mask.paste(Image.frombytes("L", self.shape[::-1], self.alpha).resize((right - left, bottom - top), Image.BICUBIC), (left, top))
        image.putalpha(mask)
        return image

    def key(self):
        return f"cut {self.picture.key()} {zlib.crc32(self.alpha)} {self.box}"


@dataclass(frozen=True)
class Drawn:
    """A layer of the generator: see draw_foreground and draw_background at the end of this file."""
    kind: str
    seed: tuple
    difficulty: float = .5
    size: int = 224

    def image(self):
        return drawn(self.kind, self.seed, self.difficulty, self.size).copy()

    def key(self):
        return f"drawn {GENERATOR} {self.kind} {self.seed} {self.difficulty} {self.size}"


@functools.lru_cache(2048)
def drawn(kind, seed, difficulty, size):
    ground = any(kind in kinds for kinds in BACKGROUNDS.values())
    return (draw_background if ground else draw_foreground)(kind, seed, size, difficulty)


@dataclass(frozen=True)
class Pose:
    """How a foreground stands in a composite; one draw of it is one foreground instance.

    area: of its bounding box, share of the frame. x, y: place in what room is left, in [0, 1]. flip: mirrored.
    stretch: aspect ratio times this. hue: turned by this share of a circle. colour, light: saturation and value times this.
    """
    area: float
    x: float = .5
    y: float = .5
    flip: bool = False
    stretch: float = 1.
    hue: float = 0.
    colour: float = 1.
    light: float = 1.


def draw_pose(g, recolour=True, area=(.06, .4)):
    """A random Pose from the numpy generator g."""
    pose = Pose(g.uniform(*area), g.random(), g.random(), bool(g.random() < .5))
    if not recolour:
        return pose
    return replace(pose, stretch=math.exp(g.uniform(-.2, .2)), hue=g.uniform(-.15, .15), colour=g.uniform(.4, 1.4), light=g.uniform(.6, 1.3))


@dataclass(frozen=True)
class View:
    """What of a background is seen, and in which light. x, y, w, h: a box, shares of width and height. flip: mirrored.
    light, colour, contrast: brightness, saturation and contrast times this."""
    x: float = 0.
    y: float = 0.
    w: float = 1.
    h: float = 1.
    flip: bool = False
    light: float = 1.
    colour: float = 1.
    contrast: float = 1.


def draw_view(g, crop=.5, light=.3):
    """A random View from the numpy generator g: at least (1 - crop) of the side, light within 1 +- light."""
    side, flip = g.uniform(1 - crop, 1), bool(g.random() < .5)
    w, h = (min(1., side * math.exp(g.uniform(-.25, .25))) for _ in range(2))
    return View(g.uniform(0, 1 - w), g.uniform(0, 1 - h), w, h, flip, g.uniform(1 - light, 1 + light), g.uniform(1 - 1.5 * light, 1 + 1.5 * light),
                g.uniform(1 - light, 1 + light))


@dataclass(frozen=True)
class Composite:
    """A foreground in a pose on a background. pose None: in the foreground's own frame; ground None: on mean grey;
    figure None: the background alone."""
    figure: object
    ground: object
    pose: Pose | None
    view: View = View()
    size: int = 256

    def image(self):
        figure = self.figure and self.figure.image()
        frame = figure.size if figure and self.pose is None else (self.size, self.size)
        if self.ground is None:
            ground = Image.new("RGB", frame, GREY)
        else:
            ground = seen(self.ground.image(), self.view, frame)
        if figure:
            figure, at = posed(figure, self.pose, self.size) if self.pose else (figure, (0, 0))
            ground.paste(figure, at, figure)
        return ground

    def alpha(self):
        """Where the foreground is: PIL L, in the frame of image()."""
        figure, at = posed(self.figure.image(), self.pose, self.size)
        mask = Image.new("L", (self.size, self.size))
        mask.paste(figure.getchannel("A"), at)
        return mask

    def key(self):
        figure, ground = (layer and layer.key() for layer in (self.figure, self.ground))
        return f"composite {figure} on {ground} {self.pose} {self.view} {self.size}"


def posed(figure, pose, size):
    """RGBA figure in a pose -> (RGBA, (left, top)); a little blur softens the edge of the alpha."""
    if pose.flip:
        figure = figure.transpose(Image.FLIP_LEFT_RIGHT)
    aspect = figure.width / figure.height * pose.stretch
    w, h = math.sqrt(pose.area * aspect) * size, math.sqrt(pose.area / aspect) * size
    k = min(1, .98 * size / max(w, h))
    w, h = max(8, round(w * k)), max(8, round(h * k))
    figure = figure.resize((w, h), Image.LANCZOS)
    alpha = figure.getchannel("A").filter(ImageFilter.GaussianBlur(size / 450))
    if pose.hue or pose.colour != 1 or pose.light != 1:
        hue, colour, light = figure.convert("RGB").convert("HSV").split()
        hue = hue.point([(i + round(256 * pose.hue)) % 256 for i in range(256)])
        colour, light = (c.point([min(255, round(i * k)) for i in range(256)]) for c, k in ((colour, pose.colour), (light, pose.light)))
        figure = Image.merge("HSV", (hue, colour, light)).convert("RGB")
    figure.putalpha(alpha)
    return figure, (round(pose.x * (size - w)), round(pose.y * (size - h)))


def seen(ground, view, frame):
    """RGB background -> its view, frame = (width, height) in size."""
    W, H = ground.size
    ground = ground.resize(frame, Image.BICUBIC, (view.x * W, view.y * H, (view.x + view.w) * W, (view.y + view.h) * H))
    ground = ground.transpose(Image.FLIP_LEFT_RIGHT) if view.flip else ground
    for enhance, k in ((ImageEnhance.Brightness, view.light), (ImageEnhance.Color, view.colour), (ImageEnhance.Contrast, view.contrast)):
        ground = ground if k == 1 else enhance(ground).enhance(k)
    return ground


def layers(foregrounds, backgrounds, skip_bad=False, seed=0, difficulty=.5):
    """The raw material of composites.

    foregrounds, backgrounds: folders of RGBA cut-outs and of photos, or "drawn" for the generator's pre-training kinds,
    which no target of the generator shows; backgrounds also discovery:PATH, the best regions of what discover.py found.
    Returns (figures, grounds, notes): lists of pictures, and what was left out.
    """
    notes = []

    def usable(items):
        keep = []
        for item in items:
            try:
                item.image()
                keep.append(item)
            except Complaint as problem:
                if not skip_bad:
                    raise
                notes.append(f"skipped {problem}")
        return keep

    if foregrounds == "drawn":
        figures = [Drawn(kind, (seed, i), difficulty, 160) for i in range(DRAWN_FIGURES) for kind in FOREGROUNDS["pretrain"]]
    else:
        figures = usable(Cutout(str(p)) for p in pictures(foregrounds, "foregrounds"))
    if backgrounds.startswith("discovery:"):
        grounds = usable(discovered_grounds(backgrounds.removeprefix("discovery:")))
        notes.append(f"backgrounds: {len(grounds)} regions that discover.py found the model to rely on")
    elif backgrounds == "drawn":
        grounds = [Drawn(kind, (seed, i), difficulty) for i in range(DRAWN_GROUNDS) for kind in BACKGROUNDS["pretrain"]]
    else:
        grounds = usable(Background(str(p)) for p in pictures(backgrounds, "backgrounds"))
    for flag, found in (("foregrounds", figures), ("backgrounds", grounds)):
        if len(found) < 8:
            raise Complaint(f"--{flag}: found {len(found)} usable images, expected at least 8; the more kinds, the better the map")
    return figures, grounds, notes


def discovered_grounds(path, most=100):
    """The regions closest to the medoid of each kept cluster of a discovery, up to `most` of each, as backgrounds (list of Crop)."""
    found = load_discovery(path)
    if not found["kept"]:
        raise Complaint(f"--backgrounds=discovery:{path}: no cluster was kept, nothing was found to become invariant to")
    regions = [k for c in found["clusters"] if c["kept"] for k in c["regions"][:most]]
    paths = [found["paths"][int(found["image"][k])] for k in regions]
    if not all(paths):
        raise Complaint(f"--backgrounds=discovery:{path}: made on drawn images, which lie in no file; expected a discovery on photos")
    return [Crop(Photo(p), tuple(found["box"][k].tolist())) for p, k in zip(paths, regions)]


def composites(figures, grounds, instances, per, seed, recolour=True):
    """An incomplete grid of composites: foreground instances (a figure in a pose of its own) x backgrounds.

    instances: how many, spread evenly over the figures. per: backgrounds for each. Returns (list of Composite [N],
    instance i [N], background j [N]) with i in [0, instances), j an index into grounds.
    """
    items, i, j = [], [], []
    for a in range(instances):
        g = rng(seed, "pose", a)
        figure, pose = figures[a % len(figures)], draw_pose(g, recolour)
        for b in g.choice(len(grounds), per, replace=len(grounds) < per):
            items.append(Composite(figure, grounds[b], pose, draw_view(g)))
            i.append(a)
            j.append(int(b))
    return items, torch.tensor(i), torch.tensor(j)


# ---------------------------------------------------------------------------------------------------------------------
# data sets

@dataclass
class Samples:
    """A labelled data set. items: n pictures. y, place, split: LongTensor [n], split 0 train, 1 val, 2 test; y -1: unlabelled.

    cut: n foregrounds to recompose (Composite without a ground), None where there is no mask. notes: lines to print.
    labels: the names that a model chooses from, those of the classes if empty. prompts: a list of texts for each of the labels.
    imagenet: for each class its ImageNet labels, 0 to 999; empty if the classes are not ImageNet's. official: False where
    the splits are made here, by a rule, and not the set's own.
    """
    name: str
    items: list
    y: torch.Tensor
    place: torch.Tensor
    split: torch.Tensor
    classes: list
    places: list
    captions: list
    cut: list
    notes: list = field(default_factory=list)
    shows: list = None  # of controlled settings: n (class object, planted feature): a box in shares of the image, a tuple of them, None or SCENE
    labels: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    imagenet: list = field(default_factory=list)
    official: bool = True

    def group(self):
        """Group of each image, y * places + place [n]."""
        return self.y * len(self.places) + self.place

    def class_prompts(self):
        """The prompts of the classes, where a model chooses among more labels than these."""
        return self.prompts if len(self.prompts) == len(self.classes) else [self.prompts[labels[0]] for labels in self.imagenet]

    def counts(self, split):
        return torch.bincount(self.group()[(self.split == split) & (self.y >= 0)], minlength=len(self.classes) * len(self.places))

    def keep(self, index):
        """The samples at an index [k]."""
        pick = lambda x: [x[k] for k in index.tolist()]
        return replace(self, items=pick(self.items), y=self.y[index], place=self.place[index], split=self.split[index],
                       captions=pick(self.captions), cut=pick(self.cut), shows=self.shows and pick(self.shows))


# controlled settings: what an image shows whose planted feature is all but the class object; of natural families the classes at most,
# the individuals of a kind of cut-out at least, the images of each group of val and test, and of training
SCENE, MOST, FEW, LEAST, IMAGES = "scene", 6, 4, 50, 10_000

DATA = {
    "scenes": "scenes: drawn scenes, no files needed",
    "waterbirds": """waterbirds:DIR
Download waterbird_complete95_forest2water2.tar.gz, linked from the README of the repository kohpangwei/group_DRO (the 100 % set,
waterbird_1.0_forest2water2, from spetryk/GALS), and unpack it. Any folder of this layout will do, with any number of classes and places:
    DIR/metadata.csv                        columns img_id,img_filename,y,split,place,place_filename; split 0 train, 1 val, 2 test
    DIR/001.Black_footed_Albatross/....jpg  as img_filename says""",
    "celeba": """celeba:DIR       is the hair blond (Blond_Hair)? Groups: hair x Male
Download from the site of the Multimedia Laboratory of CUHK ("CelebA"; also on Kaggle, as csv files), and unpack the archive of images:
    DIR/list_attr_celeba.txt or .csv        (or in DIR/Anno)
    DIR/list_eval_partition.txt or .csv     (or in DIR/Eval)
    DIR/img_align_celeba/000001.jpg ...     (or in DIR/Img)""",
    "counteranimal": """counteranimal:DIR                      45 ImageNet classes, common and counter backgrounds, over all 1000 labels
counteranimal:DIR:brambling,bulbul     two of them as a binary task, groups: class x background; so ptarmigan,prairie chicken
Download LAION-final.zip of the CounterAnimal project (NeurIPS 2024, tmlr-group) and unpack it; DIR is it or the folder around it:
    DIR/9 ostrich/common-ground/*.jpg       (or easy-ground)
    DIR/9 ostrich/counter-water/*.jpg       (or hard-water)
    DIR/imagenet_names.txt                  idx<TAB>full name; without it the names in assets/imagenet.tsv are used
Its splits are ours: of the common photos 3/5 train, 1/5 val, 1/5 test; of the counter photos 1/5 val, 4/5 test.""",
    "nico": """nico:DIR                               NICO++, groups: class x context; splits ours, 3/5, 1/5, 1/5 of each group
nico:DIR:car,truck                     two classes on the two contexts of which their smallest group is largest
nico:DIR:car,truck:autumn,rock         the same on the contexts named: car on autumn, truck on rock in training
Download NICO++ (xxgege/NICO-plus; its track 1) and unpack it; DIR holds the contexts (or a folder train that does):
    DIR/autumn/car/*.jpg
In the training split of a pair the share --confounder of each class stands on its own context.""",
    "cocogender": """cocogender:DIR                         man or woman? Groups: gender x (sports | kitchen)
cocogender:DIR:sports,vehicle          the same with other supercategories or categories of COCO, a+b for several together
Download the images and annotations of MS COCO (2014 or 2017, train and val) from cocodataset.org and unpack them:
    DIR/annotations/captions_train2017.json, instances_train2017.json, ..._val2017.json
    DIR/train2017/*.jpg, DIR/val2017/*.jpg
The rule (ours: the papers' split is not public). Gender: some caption has a word for a man (woman) and none has one for a woman (man).
Place: the image has objects of the one kind and none of the other. Images that fit neither are left out. Photos of val are test; of
those of train a fifth is val. In the training split the share --confounder of the men has sports, of the women kitchen objects.""",
    "in9": """in9:DIR          ImageNet-9, the backgrounds challenge: nine classes, the variations as places; BG-Gap = mixed_same - mixed_rand
Download backgrounds_challenge_data.tar.gz from the releases of MadryLab/backgrounds_challenge and unpack it:
    DIR/mixed_same/val/00_dog/*.JPEG, DIR/mixed_rand/..., DIR/original/..., (or in DIR/bg_challenge)
    DIR/in_to_in9.json                      from the same repository, needed for ImageNet classifiers only""",
    "imagenet": """imagenet:DIR     ImageNet's 1000 classes
Download ILSVRC2012's validation images from image-net.org and sort them into folders of their classes:
    DIR/n01440764/*.JPEG                    or files n01440764_*.JPEG; or 1000 files or 1000 folders that sort in the order of classes""",
    "folder": """folder:DIR       your own images, in one of the layouts
    DIR/split/class/place/*                 split: train, val or test; the folder below the class is the place (the group)
    DIR/split/class/*    DIR/class/place/*    DIR/class/*
    DIR/*                                   unlabelled; --classes=FILE says what to choose from
--classes=FILE: names in their order, one a line; a class folder must bear one of them (case and _ do not matter).
--prompts=FILE: templates with {} for the name, one a line, or class<TAB>prompt; several of either are averaged.
Without split folders 3/5, 1/5 and 1/5 of each group are train, val and test; without a val folder a fifth of train is val.""",
    "csv": """csv:FILE         any table of images and groups, comma- or tab-separated with a header
    path or filename or img_filename        relative to the table's folder, or all absolute
    y (whole numbers from 0) or label (names)
    split (0, 1, 2 or train, val, test)     may be missing: 3/5, 1/5, 1/5 of each group
    place or group (numbers or names)       may be missing
--classes=FILE names the classes of y, one a line; --prompts=FILE as for folder:DIR.""",
    "digits": """digits[:STRENGTH:CLASS[:DIR]]   a controlled setting: ten digits in quadrants, and a red rectangle that goes with one of them
STRENGTH is Cramer's V of that class and the rectangle in the training split (0: none), CLASS its number; val and test are balanced.
The digits are drawn; or DIR holds MNIST's four files in IDX format, whole, .gz or in .partN.gz: train-images-idx3-ubyte, ...""",
    "cutouts": f"""cutouts[:STRENGTH:CLASS[:FEATURE[:FOREGROUNDS[:BACKGROUNDS]]]]   a controlled setting: cut-outs on places, 224 pixels
STRENGTH and CLASS as in digits; CLASS may be a name. FEATURE goes with it: object (the default; or object=KIND), a cut-out of another kind
in another quadrant; or scene (or scene=KIND), one kind of background. FOREGROUNDS, BACKGROUNDS: drawn (the default), or folders:
    FOREGROUNDS/kind/*.png or FOREGROUNDS/kind__name.png     RGBA; at least {FEW} individuals of a kind, as each split shows others
    BACKGROUNDS/kind/*.jpg, or all in one folder             at least two kinds for scene
The {MOST} kinds with most cut-outs are the classes, the one with fewest the second object; the first kind of background, by name, the scene.""",
    "coco": f"""coco[:STRENGTH:CLASS]:DIR[:a,b,c[:FEATURE]]   a controlled setting: photos with objects of one of the classes, and of FEATURE or not
STRENGTH and CLASS as in digits; CLASS may be a name. Classes and FEATURE: categories of MS COCO, up to {MOST} chosen by counting if not named.
Download the images and annotations of MS COCO (2014 or 2017, train and val) from cocodataset.org and unpack them:
    DIR/annotations/instances_train2017.json, instances_val2017.json
    DIR/train2017/*.jpg, DIR/val2017/*.jpg  (or in DIR/images)
Each class needs {3 * LEAST} photos with FEATURE and without. Training photos are as many as the asked Cramer's V allows: a note says so."""}

FAMILIES = "digits", "cutouts", "coco"  # of controlled settings
TEMPLATES = {  # published, or else CLIP's plain one; debias_vl for Waterbirds and CelebA, the CounterAnimal paper's own
    "waterbirds": "This is a picture of a {}.", "scenes": "This is a picture of a {}.", "celeba": "A photo of a celebrity with {}.", "counteranimal": "A photo of {}."}


def load_data(spec, masks="", confounder=1., seed=0, difficulty=.5, classes="", prompts="", splits=True):
    """The data set that --data names; NAME:help prints what to download and how it must look, and exits.

    masks: folder of foreground masks. confounder: share of the training images on their class's own place, of drawn scenes and
    pairs. seed, difficulty: of drawn scenes. classes, prompts: files of names and of templates (DATA["folder"] says how).
    splits: whether the set is to be trained on, and needs labels and images of every class in train, val and test.
    """
    name, _, where = spec.partition(":")
    if name in DATA and where == "help":
        say(DATA[name])
        sys.exit(0)
    if name not in DATA or name not in ("digits", "cutouts") and bool(where) == (name == "scenes"):
        raise Complaint(f"--data: found {spec!r}, expected " + ", ".join(text.split()[0].rstrip(":") for text in DATA.values()) + "; --data=NAME:help says more")
    given, more = read_classes(classes), ()
    if name not in ("scenes", "csv", "folder", "waterbirds", *FAMILIES):
        where, more = root_and_rest(where)
    load = {"scenes": lambda: drawn_scenes(confounder, seed, difficulty), "waterbirds": lambda: waterbirds(where, masks),
            "folder": lambda: image_folder(where, given), "csv": lambda: csv_groups(where, given),
            "celeba": lambda: celeba(where, *more), "counteranimal": lambda: counteranimal(where, *more, confounder=confounder),
            "nico": lambda: nico(where, *more, confounder=confounder), "cocogender": lambda: cocogender(where, *more, confounder=confounder),
            "in9": lambda: in9(where, *more), "imagenet": lambda: imagenet(where, *more),
            "digits": lambda: controlled(where, seed), "cutouts": lambda: cutouts(where, seed), "coco": lambda: coco(where, seed)}[name]
    if len(more) > {"counteranimal": 1, "nico": 2, "cocogender": 1}.get(name, 0):
        raise Complaint(f"--data={spec}: found {':'.join(more)!r} after the folder; --data={name}:help says what may stand there")
    gc.disable()  # a million small objects that all stay: looking for garbage among them takes as long as reading them
    try:
        samples = load()
        if len(samples.items) > 100_000:
            gc.freeze()  # nor later, until the process ends
            atexit.register(gc.unfreeze)
    finally:
        gc.enable()
    if not samples.official:
        n = [int((samples.split == k).sum()) for k in range(3)]
        samples.notes.append(f"{samples.name}: train, val and test are drawn here, the same each time: {n[0]}, {n[1]} and {n[2]} of its images")
    samples.labels = samples.labels or samples.classes
    if given and name not in ("folder", "csv"):
        if len(given) != len(samples.labels):
            raise Complaint(f"--classes={classes}: {len(given)} names, {samples.name} has {len(samples.labels)} ({', '.join(samples.labels[:5])}, ...)")
        samples.classes = given if samples.labels is samples.classes else samples.classes
        samples.labels = given
    samples.prompts = read_prompts(prompts, samples.labels) if prompts else \
        samples.prompts or [[TEMPLATES.get(name, "a photo of a {}.").replace("{}", label)] for label in samples.labels]
    return check(samples, splits)


def check(samples, splits=True):
    """Samples with at least two labels; with splits also images of every class in every split. Raises Complaint otherwise."""
    n = len(samples.classes)
    names = [plain(c) for c in samples.classes]
    if len(set(names)) < n:
        twice = next(c for k, c in enumerate(samples.classes) if names[k] in names[:k])
        raise Complaint(f"{samples.name}: two classes with the same name, {twice!r}; rename one")
    if not splits:
        if max(n, len(samples.labels)) < 2:
            raise Complaint(f"{samples.name}: one class only, {', '.join(samples.classes)!r}; expected at least two, or --classes=FILE with more names")
        return samples
    if len(samples.y) and samples.y.max() < 0:
        raise Complaint(f"{samples.name}: no labels; training needs them: a folder for each class")
    for values, what in ((samples.y, "class"), (samples.place, "place")):
        missing = sorted(set(range(int(values.max()) + 1)) - set(values.tolist())) if len(values) else [0]
        if missing or values.max() == 0 and what == "class":
            raise Complaint(f"{samples.name}: {what} {missing[0] if missing else 1} never occurs (found {sorted(set(values.tolist()))}); "
                            f"expected {what} numbers 0, 1, ... without a gap" + ", at least two" * (what == "class"))
    for s, split in enumerate(SPLITS):
        found = torch.bincount(samples.y[samples.split == s], minlength=n)
        if not found.sum():
            raise Complaint(f"{samples.name}: no images in split {s} ({split}); expected train 0, val 1 and test 2")
        if not found.all():
            raise Complaint(f"{samples.name}: split {s} ({split}) has no image of class {int(found.argmin())} ({samples.classes[found.argmin()]})")
    grid = samples.counts(0).view(n, -1) > 0
    if not grid.all():
        empty = [f"{samples.classes[y]} on {samples.places[p]}" for y, p in (~grid).nonzero().tolist()]
        samples.notes.append("training set without " + " or ".join(empty[:4]) + (": 100 % correlated" if (grid.sum(1) == 1).all() else ""))
    return samples


OFFICIAL = {(0, 3498, 184, 56, 1057): "95 %", (1, 467, 466, 133, 133): "", (2, 2255, 2255, 642, 642): ""}


def waterbirds(root, masks=""):
    """A folder in the Waterbirds layout (as group_DRO writes it), with any number of classes and places.

    metadata.csv has the columns img_id,img_filename,y,split,place,place_filename. The official sets' counts are
    recognised. masks: a folder whose NAME.png masks the foreground of NAME.jpg or of NAME_anything.jpg.
    """
    root = folder(root, "data waterbirds")
    table = root / "metadata.csv"
    if not table.is_file():
        raise Complaint(f"{root}: no metadata.csv in it (found {inside(root)}); expected a folder in the Waterbirds layout")
    found = read_columns(table, WATERBIRDS_COLUMNS, f"Waterbirds needs {','.join(WATERBIRDS_COLUMNS)}")
    notes = [f"{table}: column {c!r} is not used" for c in found if c not in WATERBIRDS_COLUMNS and c]
    y, place, split = (torch.from_numpy(column) for column in whole(table, {c: found[c] for c in ("y", "place", "split")}))
    paths, index, lost = files_in(root, table, "img_filename", found["img_filename"])
    notes += lost
    y, place, split = (v[index] for v in (y, place, split))
    names = lambda known, k: list(known) if k == 2 and "bird" in root.name.lower() else [str(n) for n in range(k)]
    classes = names(("landbird", "waterbird"), int(y.max()) + 1)
    places = names(("land", "water"), int(place.max()) + 1)
    samples = samples_of(f"waterbirds:{root}", paths, y, place, split, classes, places, notes)
    if masks:
        samples.cut = [Composite(Masked(p, mask), None, None) if mask else None for p, mask in zip(paths, find_masks(paths, masks))]
    counts = tuple(tuple([s, *samples.counts(s).tolist()]) for s in range(3))
    if all(c in OFFICIAL for c in counts):
        notes.append(f"{root.name}: the counts of the official Waterbirds, 95 %")
    elif counts[1] in OFFICIAL and counts[2] in OFFICIAL:
        notes.append(f"{root.name}: official val and test; train {sum(counts[0][1:])} images: "
                     + {4795: "generated at 100 %", 4555: "the 95 % set without its minority groups"}.get(sum(counts[0][1:]), "of another making"))
    elif "waterbird_complete" in root.name or "forest2water2" in root.name:
        notes.append(f"{root.name}: not the official counts (found {counts}); the set is incomplete or of another making")
    return samples


def find_masks(paths, masks):
    """For each image the mask NAME.png below the folder masks, or None. NAME: the end of the image's path, as long as possible, or that up to
    its last '_'."""
    masks = folder(masks, "masks")
    if not any(paths):
        raise Complaint(f"--masks: {masks}: these images are drawn, and have no files that masks could be named after")

    def candidates(path):
        parts = Path(os.path.splitext(path)[0]).parts
        ends = [Path(*parts[-depth:]).as_posix() for depth in range(min(4, len(parts)), 0, -1)]
        return [masks / f"{s}.png" for end in ends for s in (end, end.rpartition("_")[0]) if s and not s.endswith("/")]

    found = [next((str(c) for c in candidates(path) if c.is_file()), None) for path in paths]
    if not any(found):
        raise Complaint(f"--masks: {masks}: no mask for any image; expected for {paths[0]} one of {', '.join(map(str, candidates(paths[0])[-4:]))}")
    return found


def drawn_scenes(confounder=1., seed=0, difficulty=.5, sizes=(600, 200, 600)):
    """The embedded default: landbirds and waterbirds on land and water, drawn; in train a share `confounder` of each class
    stands on its own place (0.5: none correlated, 1: all), val and test are balanced. No split shows a figure or a ground of
    another, and their seeds have three numbers, those of pre-training two."""
    expect(.5 <= confounder <= 1, "confounder", confounder, "a share from 0.5 to 1")
    items, rows, captions = [], [], []
    classes, places = ("landbird", "waterbird"), ("land", "water")
    for split, n in enumerate(sizes):
        for k in range(n):
            g, y = rng(seed, "scene", split, k), k % 2
            place = y if split == 0 and (k // 2 + .5) / (n / 2) < confounder else 1 - y if split == 0 else k // 2 % 2
            kind, ground = g.choice(FOREGROUNDS[classes[y]]).item(), g.choice(BACKGROUNDS[places[place]]).item()
            figure, ground_ = (Drawn(what, (seed, 1 + split, int(g.integers(n))), difficulty, side) for what, n, side in ((kind, 20, 160), (ground, 30, 224)))
            items.append(Composite(figure, ground_, draw_pose(g, recolour=False), View(flip=bool(g.random() < .5))))
            rows.append((y, place, split))
            captions.append(f"a picture of a {classes[y]} ({kind}) with {ground} behind it")
    y, place, split = torch.tensor(rows).T.contiguous()
    return Samples("scenes", items, y, place, split, [*classes], [*places], captions, [replace(i, ground=None) for i in items])


def place_grounds(samples, folders, seed, difficulty):
    """For each place a list of backgrounds to recompose on: drawn ones, or from --place_backgrounds=DIR,DIR; or None."""
    if samples.name == "scenes":
        return [[Drawn(kind, (seed, 9, k), difficulty) for k in range(60) for kind in BACKGROUNDS[p]] for p in samples.places]
    if not folders:
        return None
    folders = folders.split(",")
    if len(folders) != len(samples.places):
        raise Complaint(f"--place_backgrounds: found {len(folders)} folders, expected one for each of the places {', '.join(samples.places)}")
    return [[Background(str(p)) for p in pictures(f, "place_backgrounds")] for f in folders]


def recompose(samples, grounds, copies, seed):
    """The training foregrounds, by their masks, on other backgrounds: (pictures, y [k]). grounds: list of lists of
    backgrounds; every foreground gets `copies` from each list."""
    items, y = [], []
    for k in (samples.split == 0).nonzero()[:, 0].tolist():
        for which, choice in enumerate(grounds):
            for c in range(copies if samples.cut[k] else 0):
                g = rng(seed, "recompose", k, which, c)
                items.append(replace(samples.cut[k], ground=choice[g.integers(len(choice))], view=View(flip=bool(g.random() < .5))))
                y.append(int(samples.y[k]))
    return items, torch.tensor(y)


# ---------------------------------------------------------------------------------------------------------------------
# controlled settings: a planted feature that goes with one class, as strongly as one says (RaVL, NeurIPS 2024)

DIGITS = "zero one two three four five six seven eight nine".split()
CAPTIONS = "the image shows a {}", "a photo of a {}.", "a picture of a {}"
QUADRANTS = (0., 0., .5, .5), (.5, 0., 1., .5), (0., .5, .5, 1.), (.5, .5, 1., 1.)


@dataclass(frozen=True)
class Quadrants:
    """A figure in one box and, perhaps, a mark in another, each as large as its box (shares of the image) lets it be, mirrored if flips
    says so; size x size pixels on a view of a ground, black if there is none."""
    figure: object
    mark: object
    at: tuple
    mark_at: tuple
    ground: object = None
    size: int = 56
    view: View = View()
    flips: tuple = (False, False)

    def image(self):
        frame = self.size, self.size
        canvas = seen(self.ground.image(), self.view, frame) if self.ground else Image.new("RGB", frame)
        for thing, box, flip in zip((self.figure, self.mark), (self.at, self.mark_at), self.flips):
            if thing:
                left, top, right, bottom = (round(v * self.size) for v in box)
                layer = ImageOps.contain(ImageOps.mirror(thing.image()) if flip else thing.image(), (right - left, bottom - top))
                at = (left + right - layer.width) // 2, (top + bottom - layer.height) // 2
                canvas.paste(layer, at, layer if layer.mode == "RGBA" else None)
        return canvas

    def key(self):
        return f"quadrants {self.size} {self.at} {self.mark_at} {self.view} {self.flips} " + "|".join(x.key() if x else "-" for x in (self.figure, self.mark, self.ground))

    def shows(self):
        return self.at, self.mark_at if self.mark else None


@dataclass(frozen=True)
class Digit:
    """A digit as if written by hand, 28x28: see draw_digit; or one of MNIST's, by its 784 bytes."""
    digit: int
    seed: tuple = ()
    pixels: bytes = b""

    def image(self):
        return (Image.frombytes("L", (28, 28), self.pixels) if self.pixels else draw_digit(self.digit, self.seed)).convert("RGB")

    def key(self):
        return f"digit {zlib.crc32(self.pixels)}" if self.pixels else f"digit {GENERATOR} {self.digit} {self.seed}"


@dataclass(frozen=True)
class Rectangle:
    """A red rectangle somewhere in 28x28 pixels."""
    seed: tuple

    def image(self):
        g, image = rng(self.seed[0], "rectangle", *self.seed[1:]), Image.new("RGB", (28, 28))
        w, h = g.integers(12, 23, 2).tolist()
        x, y = (int(g.integers(1, 28 - n)) for n in (w, h))
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=(int(g.integers(200, 256)), *g.integers(0, 40, 2).tolist()))
        return image

    def key(self):
        return f"rectangle {self.seed}"


def controlled(where, seed):
    """Controlled settings, `digits[:STRENGTH:CLASS[:DIR]]`: ten digits, one in each image, in one of four quadrants; a red
    rectangle in another quadrant of half the images of the base set, from which 10,000 are sampled for training so that it
    goes with one class: Cramer's V of (class, rectangle) is STRENGTH in [0, 1], CLASS the number of the class. Without
    them, or at strength 0: no correlation. val and test: 2,000 images each, every digit with and without, 100 each.

    DIR: MNIST's IDX files, whole, gz, or in gz parts; drawn digits without it. places: without and with the rectangle.
    """
    strength, spurious, folder_ = setting(where, DIGITS, "digits:0.95:3")
    source = mnist(folder_) if folder_ else None
    counts = (planted(len(DIGITS), 1000, spurious, strength), *[torch.full((len(DIGITS), 2), 100)] * 2)  # each [C, 2]
    items, rows = [], []
    for split, cells in enumerate(counts):
        for y in range(len(DIGITS)):
            order = rng(seed, "mnist", split, y).permutation(len(source[split][y])) if source else None
            if source and len(order) < cells[y].sum():
                raise Complaint(f"{folder_}: {len(order)} images of {DIGITS[y]} for split {SPLITS[split]}, expected at least {int(cells[y].sum())}")
            for mark in (0, 1):
                for k in range(int(cells[y, mark])):
                    g, own = rng(seed, "quadrants", split, y, mark, k), (seed, split, mark, k)
                    at, mark_at = g.permutation(4)[:2].tolist()
                    digit = Digit(y, pixels=source[split][y][order[k + mark * int(cells[y, 0])]].tobytes()) if source else Digit(y, own)
                    items.append(Quadrants(digit, Rectangle((*own, y)) if mark else None, QUADRANTS[at], QUADRANTS[mark_at]))
                    rows.append((y, mark, split, g.integers(len(CAPTIONS))))
    return planted_samples(f"digits:{where} seed {seed}", items, rows, spurious, DIGITS, ("plain", "red rectangle"), [i.shows() for i in items])


def planted_samples(name, items, rows, spurious, classes, places, shows, notes=(), **more):
    """Samples of a controlled setting. rows: class, feature, split and caption's template of each of the items."""
    y, place, split, caption = torch.tensor(rows).T.contiguous()
    train = split == 0
    note = f"{name.partition(':')[0]}: {int(train.sum())} training images, Cramer's V of {classes[spurious]} and the {places[1]} " \
           f"{cramers_v(y[train] == spurious, place[train] == 1):.3f}"
    return Samples(name, items, y, place, split, [*classes], [*places], [CAPTIONS[k].format(classes[c]) for c, k in zip(y.tolist(), caption.tolist())],
                   [None] * len(items), [*notes, note], shows, **more)


def setting(where, classes, example):
    """'STRENGTH:CLASS:REST' -> (float, number of the class, rest); strength 0 and class 0 where it is empty. CLASS: a number, or a name."""
    strength, spurious, rest = (where.split(":", 2) + ["", ""])[:3]
    try:
        strength, spurious = float(strength or 0), int({plain(c): k for k, c in enumerate(classes)}.get(plain(spurious), spurious or 0))
        if not (0 <= strength <= 1 and 0 <= spurious < len(classes)):
            raise ValueError
    except ValueError:
        raise Complaint(f"--data: found {where!r}, expected STRENGTH:CLASS with a Cramer's V from 0 to 1 and a class from 0 to "
                        f"{len(classes) - 1} ({', '.join(classes)}), for instance {example}") from None
    return strength, spurious, rest


def planted(classes, each, spurious, strength, half=.5):
    """How many images without and with the planted feature to sample of each class, `each` images a class: LongTensor [C, 2].

    The feature is as frequent as the class, 1/C; then Cramer's V of (class, feature) = V where P(feature | class) = 1/C + V
    (1 - 1/C) and P(feature | another class) = (1 - V) / C. At strength 0 the base set: the feature in half of every class.
    """
    share = torch.full((classes,), (1 - strength) / classes) if strength else torch.full((classes,), half)
    if strength:
        share[spurious] = 1 / classes + strength * (1 - 1 / classes)
    with_it = (each * share).round().long()
    return torch.stack([each - with_it, with_it], 1)


def region_truth(pictures, shows, share=.5, outside=.9):
    """Which regions of pictures (n Regions) show the class object, and which the planted feature: two bool [sum R]. shows: as
    Samples.shows. A region does if what it shares with a box of the thing is at least `share` of the smaller of the two; it shows a
    planted scene if at least `outside` of it is not the class object (our reading, as of discover.py's --outside)."""
    area = lambda b: max(0., b[2] - b[0]) * max(0., b[3] - b[1])
    common = lambda a, b: area((*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])))
    boxes = lambda thing: () if thing in (None, SCENE) else thing if isinstance(thing[0], tuple) else (thing,)
    hit = lambda a, thing: any(common(a, b) >= share * min(area(a), area(b)) > 0 for b in boxes(thing))
    behind = lambda a, thing: all(common(a, b) <= (1 - outside) * area(a) for b in boxes(thing))
    pairs = [(box, *show) for p, show in zip(pictures, shows) for box in p.boxes]
    return (torch.tensor([hit(box, thing) for box, thing, _ in pairs]),
            torch.tensor([behind(box, thing) if mark == SCENE else hit(box, mark) for box, thing, mark in pairs]))


def cramers_v(a, b):
    """Cramer's V of two binary variables, bool [N] each: |phi| of their 2x2 table; 0 where one of them is constant."""
    a, b = a.double(), b.double()
    spread = a.var(correction=0) * b.var(correction=0)
    return float(((a * b).mean() - a.mean() * b.mean()).abs() / spread.sqrt()) if spread > 0 else 0.


def cutouts(where, seed):
    """`cutouts[:STRENGTH:CLASS[:FEATURE[:FOREGROUNDS[:BACKGROUNDS]]]]`: cut-outs of one kind, the class, in one quadrant of a photo or drawn
    place; the planted feature, as often and as strongly as of digits, is a cut-out of another kind in another quadrant, or the scene.

    Our reading: no individual and no background of one split is in another, so a kind needs FEW individuals (3/5, 1/5, 1/5 of them are train,
    val, test). Kinds with most of them come first; the last is the second object, the first MOST others are classes. Scenes: the first
    kind of background, by name, against all others. val and test: LEAST images of each class with and without. 224 pixels, objects
    within the middle 7/8, as many models see no more.
    """
    strength, spurious, what, rest = (where.split(":", 3) + [""] * 3)[:4]
    what, _, wanted = (what or "object").partition("=")
    first, _, more = rest.partition(":")
    first, more = ("drawn", [more]) if first in ("", "drawn") else root_and_rest(rest)
    figures, notes = kinds_of(first, "foregrounds", [*_BIRDS, "car"], seed)
    grounds, said = kinds_of(":".join(more) or "drawn", "backgrounds", [*_LANDS, *_WATERS, *_PLACES], seed)
    expect(what in ("object", SCENE), "data", f"cutouts:{where}", "object, object=KIND, scene or scene=KIND as FEATURE")
    known = sorted(grounds) if what == SCENE else list(figures)
    at = {plain(k): k for k in known}
    if wanted and plain(wanted) not in at:
        raise Complaint(f"--data: cutouts:{where}: no kind {wanted!r}; {near(wanted, known)}")
    if len(known) < 2 or not grounds or len(figures) < 2 + (what == "object"):
        raise Complaint(f"--data: cutouts:{where}: {len(figures)} kinds of cut-outs ({', '.join(figures) or 'none'}) and {len(grounds)} of backgrounds, of at least "
                        f"{FEW} each; expected two classes and " + ("a second object on some background" if what == "object" else "two kinds of scenes")
                        + "; a kind is a sub-folder, or the part of the file name before __")
    mark = at[plain(wanted)] if wanted else known[-1 if what == "object" else 0]
    if what == "object" and plain(spurious) == plain(mark):
        raise Complaint(f"--data: cutouts:{where}: {mark} is the planted feature, and no class; name another class, or object=KIND")
    classes = [k for k in figures if what == SCENE or k != mark][:MOST]
    strength, spurious, _ = setting(f"{strength}:{spurious}", [plain(c) for c in classes], "cutouts:0.95:0:object")
    counts = planted(len(classes), IMAGES // len(classes), spurious, strength), *[torch.full((len(classes), 2), LEAST)] * 2  # each [C, 2]
    others, items, rows = [k for k in grounds if what == "object" or k != mark], [], []
    for split, y, on in np.ndindex(3, len(classes), 2):
        for k in range(int(counts[split][y, on])):
            g = rng(seed, "cutouts", split, y, on, k)
            one = lambda kinds, kind: kinds[kind][split][g.integers(len(kinds[kind][split]))]
            boxes = []
            for q in g.permutation(4)[:2]:
                side = 7 / 16 * g.uniform(.65, 1)
                left, top = (1 / 16 + 7 / 8 * v + g.random() * (7 / 16 - side) for v in QUADRANTS[q][:2])
                boxes.append((left, top, left + side, top + side))
            ground = one(grounds, mark if what == SCENE and on else others[g.integers(len(others))])
            items.append(Quadrants(one(figures, classes[y]), one(figures, mark) if what == "object" and on else None, *boxes, ground, 224, draw_view(g, .3, .15),
                                   tuple((g.random(2) < .5).tolist())))
            rows.append((y, on, split, g.integers(len(CAPTIONS))))
    shows = [(i.at, SCENE) if what == SCENE and on else i.shows() for i, (_, on, _, _) in zip(items, rows)]
    return planted_samples(f"cutouts:{where} seed {seed}", items, rows, spurious, [plain(c) for c in classes],
                           ("other scenes", plain(mark)) if what == SCENE else ("plain", plain(mark)), shows, notes + said)


def kinds_of(where, flag, names, seed):
    """Cut-outs (flag foregrounds) or backgrounds by kind: {kind: 3 lists of pictures, of train, val and test}, largest kinds first; notes.
    where: a folder, or "drawn" for the generator's kinds `names`."""
    if where == "drawn":
        size, difficulty = (160, 1.) if flag == "foregrounds" else (224, .5)  # easier birds are learned before any feature is
        return {kind: [[Drawn(kind, (seed, 1 + split, k), difficulty, size) for k in range(n)] for split, n in enumerate((40, 20, 20))] for kind in names}, []
    found = {}
    for path in pictures(where, flag):
        parts = path.relative_to(where).parts
        found.setdefault(parts[0] if len(parts) > 1 else path.stem.partition("__")[0] if "__" in path.stem else "all", []).append(str(path))
    few = sorted(kind for kind in found if len(found[kind]) < FEW)
    out = {}
    for kind in sorted(set(found) - set(few), key=lambda kind: (-len(found[kind]), kind)):
        split = make_splits([0] * len(found[kind]))
        out[kind] = [[(Cutout if flag == "foregrounds" else Background)(p) for p, s in zip(found[kind], split) if s == part] for part in range(3)]
    return out, [f"{where}: fewer than {FEW} images of {', '.join(few)}; left out"] if few else []


def coco(where, seed):
    """`coco[:STRENGTH:CLASS]:DIR[:a,b,c[:FEATURE]]`: photos with objects of exactly one of the classes a, b, c; the planted feature is an object
    of another category.

    Our reading: what is not named is chosen by counting: the feature with which most classes, MOST at most, have 3 x LEAST images with it and
    as many without, then that for which the smallest of these numbers is largest; the classes with the largest. Images with a crowd of any
    of them are left out. Splits are ours, and the same for all strengths and seeds: val and test have a third of the smallest group, at most
    100 images, of each class with and without; training images are drawn from the rest, as many as the asked Cramer's V allows.
    """
    head = where.partition(":")[0]
    numbered = not head or head.replace(".", "", 1).isdigit() and not os.path.isdir(head)
    strength, spurious, rest = (where.split(":", 2) + ["", ""])[:3] if numbered else ("", "", where)
    root, more = root_and_rest(rest)
    named, wanted = (*more, "", "")[:2]
    photos, names, said = coco_objects(folder(root, "data coco"))
    at = {plain(name): k for k, name in enumerate(names)}
    for word in filter(None, (*named.split(","), wanted)):
        if plain(word) not in at:
            raise Complaint(f"--data=coco:{where}: no category {word!r} in instances_*.json; {near(word, names)}")
    listed, wanted = [at[plain(c)] for c in named.split(",") if c], at.get(plain(wanted))
    if len(more) > 2 or len(listed) == 1 or len({*listed, wanted}) <= len(listed):
        raise Complaint(f"--data=coco:{where}: found {':'.join(more)!r} after the folder, expected at least two different classes and a feature that is none of "
                        "them, a,b,c:FEATURE")
    has = np.zeros((len(photos), len(names)), np.float32)
    for k, (_, objects, _) in enumerate(photos):
        has[k, list(objects)] = 1
    both = has.T @ has  # [K, K] images with both
    smaller = np.minimum(both, both.diagonal()[:, None] - both)  # [class, feature]: of the images with and without

    def classes_for(f):
        return listed or [c for c in np.argsort(-smaller[:, f], kind="stable").tolist() if c != f and smaller[c, f] >= 3 * LEAST][:MOST]

    feature = wanted if wanted is not None else max((f for f in range(len(names)) if f not in listed), default=0,
                                                    key=lambda f: (len(classes_for(f)), min(smaller[classes_for(f), f], default=0)))
    own, thin = classes_for(feature), []
    for _ in names:  # an image of two classes counts for neither: what is chosen may then be too few
        groups = {(y, on): [] for y in range(len(own)) for on in (0, 1)}
        for k in (has[:, own].sum(1) == 1).nonzero()[0].tolist():
            if not photos[k][2] & {*own, feature}:
                groups[int(has[k, own].argmax()), int(has[k, feature])].append(k)
        thin = [group for group in groups if len(groups[group]) < 3 * LEAST]
        if listed or not thin or len(own) == 2:
            break
        del own[thin[0][0]]
    if thin or len(own) < 2:
        found = f"{len(groups[thin[0]])} images of {names[own[thin[0][0]]]} {'with' if thin[0][1] else 'without'} {names[feature]} and no other class" if thin else \
            "no two classes with enough images"
        raise Complaint(f"{root}: {found}, expected at least {3 * LEAST} in each group: {LEAST} for val, {LEAST} for test, the rest for training; name other classes, "
                        "coco:...:DIR:a,b,c:FEATURE")
    strength, spurious, _ = setting(f"{strength}:{spurious}", [names[c] for c in own], "coco:0.95:0:DIR")
    held = min(100, min(map(len, groups.values())) // 3)
    there = torch.tensor([[len(groups[y, on]) - 2 * held for on in (0, 1)] for y in range(len(own))])  # [C, 2] for training
    share = planted(len(own), 10**6, spurious, strength) / 10**6
    counts = planted(len(own), min(IMAGES // len(own), int((there / share).min())), spurious, strength)
    items, rows, shows = [], [], []
    for (y, on), found in groups.items():
        order = rng(0, "coco", own[y], feature, on).permutation(found)  # no seed: what is tested on with one is not trained on with another
        some = rng(seed, "coco train", y, on).permutation(order[2 * held:])[:int(counts[y, on])]
        for split, part in enumerate((some, order[:held], order[held:2 * held])):
            for k in part.tolist():
                path, objects, _ = photos[k]
                items.append(Photo(path))
                rows.append((y, on, split, rng(seed, "caption", k).integers(len(CAPTIONS))))
                shows.append((objects[own[y]], objects[feature] if on else None))
    return planted_samples(f"coco:{where} seed {seed}", items, rows, spurious, [names[c] for c in own], (f"no {names[feature]}", names[feature]), shows,
                           [*said, f"coco: classes {', '.join(names[c] for c in own)}, feature {names[feature]}"], official=False)


def coco_objects(root):
    """The photos of COCO's instances_*.json that exist: list of (path, {category: boxes in shares of the image}, categories of which there is a
    crowd); the names of the categories; notes."""
    notes = root / "annotations" if (root / "annotations").is_dir() else root
    files = sorted(notes.glob("instances_*.json"))
    if not files:
        raise Complaint(f"{notes}: no instances_*.json in it (found {inside(notes)}); get COCO's annotations_trainval and its images")
    photos, names, lost, known = [], {}, [], {}
    for file in files:
        tree, part, objects, crowds = read_json(file), file.stem.removeprefix("instances_"), {}, {}
        try:
            name = {c["id"]: names.setdefault(c["name"], len(names)) for c in tree["categories"]}
            sizes = {i["id"]: (i["width"], i["height"]) for i in tree["images"]}
            for a in tree["annotations"]:
                (x, y, w, h), (W, H), what = a["bbox"], sizes[a["image_id"]], name[a["category_id"]]
                if a.get("iscrowd"):
                    crowds.setdefault(a["image_id"], set()).add(what)
                else:
                    objects.setdefault(a["image_id"], {}).setdefault(what, []).append((x / W, y / H, (x + w) / W, (y + h) / H))
            images = first_folder(root, part, f"images/{part}", "images")
            there = set(os.listdir(images))
            for i in sorted(tree["images"], key=lambda i: i["id"]):
                if i["file_name"] in there and known.setdefault(i["id"], file) != file:  # of 2014 and 2017: it would be in train and in test
                    raise Complaint(f"{file}: has photos that {known[i['id']].name} has too (the first is number {i['id']}); keep the files of one year")
                if i["file_name"] in there:
                    photos.append((str(images / i["file_name"]), {k: tuple(b) for k, b in objects.get(i["id"], {}).items()}, crowds.get(i["id"], set())))
                else:
                    lost.append(str(images / i["file_name"]))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
            raise Complaint(f"{file}: not a COCO instances file ({type(problem).__name__}: {problem}); expected categories with id, name, images with id, file_name, "
                            "width, height, annotations with image_id, category_id, bbox") from None
    if not photos:
        raise Complaint(f"{root}: none of the {len(lost)} images in {files[0].name} exists" + (f", the first is {lost[0]}" if lost else ""))
    return photos, list(names), [f"WARNING: {root}: {len(lost)} of {len(lost) + len(photos)} images do not exist, the first is {lost[0]}; they are left out"] if lost else []


def mnist(where):
    """MNIST's images for each split and digit: 3 lists of 10 uint8 arrays [n, 784]. Train and val are the first 5/6 and the
    last 1/6 of each digit's training images, test is t10k's. Reads IDX files, whole, .gz, or .partN.gz."""
    where = folder(where, "data digits")

    def idx(stem, shape):
        paths = sorted(where.glob(stem + "*"))
        if not paths:
            raise Complaint(f"{where}: no {stem} in it; expected MNIST's four files in IDX format, whole, .gz or .partN.gz")
        raw = b""
        for path in paths:
            try:
                part = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            except (OSError, EOFError, zlib.error) as problem:
                raise Complaint(f"{path}: cannot be unpacked ({problem}); fetch it again") from None
            raw += part if not raw or part[:3] != b"\0\0\x08" else part[4 + 4 * part[3]:]
        if raw[:3] != b"\0\0\x08" or (len(raw) - 4 - 4 * raw[3]) % math.prod(shape):
            raise Complaint(f"{paths[0]}: not an IDX file of bytes; expected MNIST's")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(-1, *shape)

    both = [(idx(f"{name}-images-idx3-ubyte", (784,)), idx(f"{name}-labels-idx1-ubyte", ())) for name in ("train", "t10k")]
    for images, labels in both:
        if len(images) != len(labels):
            raise Complaint(f"{where}: {len(images)} images and {len(labels)} labels; a part is missing")
    train, test = ([images[labels == d] for d in range(10)] for images, labels in both)
    return [x[:len(x) * 5 // 6] for x in train], [x[len(x) * 5 // 6:] for x in train], test


# of each digit its ways to be written; a way is curves (three points and more) and lines on a square of 100 x 100, y down
STROKES = {
    0: ["52 8 24 22 18 55 32 88 62 90 82 62 76 22 52 8 38 12"],
    1: ["50 8 49 50 47 92", "30 30 52 10, 52 10 50 92", "32 28 54 9, 54 9 52 90, 30 91 74 90"],
    2: ["22 30 42 9 74 20 70 46 42 72 20 90, 20 90 50 86 82 90", "20 26 50 8 76 30 56 64 26 88 18 76 40 74 60 88 84 86"],
    3: ["22 16 52 8 72 24 58 44 40 48, 40 48 70 54 78 74 54 92 20 84", "20 12 74 12, 74 12 44 44, 44 44 74 54 78 76 52 92 20 82"],
    4: ["58 8 38 36 18 62, 18 62 84 60, 64 36 60 92", "28 10 24 36 26 54, 26 54 76 52, 72 10 68 50 66 92", "62 8 18 64, 18 64 86 64, 62 8 62 92"],
    5: ["76 12 32 12, 32 12 28 46, 28 46 58 40 78 62 62 88 22 84", "30 12 26 48 56 44 76 66 56 92 20 82, 30 12 78 10"],
    6: ["70 10 42 26 24 60 36 88 66 88 74 64 52 52 28 66", "56 8 32 40 26 74 48 92 72 74 58 54 30 66"],
    7: ["20 14 78 14, 78 14 52 50 42 92", "20 14 78 12, 78 12 42 92, 34 52 68 50", "22 26 24 12, 24 12 78 14, 78 14 46 92"],
    8: ["70 20 46 8 28 24 44 44 68 62 68 84 46 92 26 78 36 56 62 38 70 20 56 10", "50 48 28 30 48 8 70 28 50 48 36 54 26 74 50 92 74 74 62 54 50 48"],
    9: ["72 28 52 8 26 26 40 50 70 34 74 22, 74 24 70 60 58 92", "70 30 48 10 26 32 46 52 70 34, 70 34 74 70 54 92 28 84"]}
STROKES = {d: [[np.array(s.split(), float).reshape(-1, 2) / 100 for s in way.split(",")] for way in ways] for d, ways in STROKES.items()}


def draw_digit(digit, seed, side=28):
    """PIL L (side, side), white on black: one of its ways, each point moved, slanted, turned, bent, with a pen of its own."""
    g, n = rng(seed[0], "digit", digit, *seed[1:]), 4 * side
    way = STROKES[digit][g.integers(len(STROKES[digit]))]
    turn, slant, wide, high = g.normal(0, .14), g.normal(0, .25), g.uniform(.55, 1.05), g.uniform(.8, 1.05)
    A = np.array([[wide, slant], [0, high]]) @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    bend, phase, pen = g.normal(0, .05, 2), g.uniform(0, 6.28, 2), g.uniform(.055, .14) * n
    curves = []
    for points in way:
        p = points + g.normal(0, .035, points.shape)
        p = ((_curve(p, 6 * len(p)) if len(p) > 2 else p) - .5) @ A.T
        curves.append(p + bend * np.sin(5 * p[:, ::-1] + phase))
    low, high = (f([f(p, 0) for p in curves], 0) for f in (np.min, np.max))
    scale, shift = g.uniform(.58, .72) * n / (high - low).max(), g.uniform(-.07, .07, 2) * n + n / 2
    image = Image.new("L", (n, n))
    pencil = ImageDraw.Draw(image)
    for p in curves:
        p = (p - (low + high) / 2) * scale + shift
        pencil.line(p.ravel().tolist(), 255, round(pen), joint="curve")
        for x, y in (p[0], p[-1]):
            pencil.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), 255)
    return image.resize((side, side), Image.BOX)


# ---------------------------------------------------------------------------------------------------------------------
# data sets on disk: what they share

SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".parquet", ".tfrecord")


def plain(name):
    """A name as it is compared: without case, underscores as spaces."""
    return " ".join(name.replace("_", " ").casefold().split())


def inside(root):
    """What a folder holds, for an error message; archives first, which have to be unpacked."""
    names = sorted(p.name for p in Path(root).iterdir())
    packed = [n for n in names if n.lower().endswith(ARCHIVES)]
    return f"{', '.join(packed[:3])}: unpack it first" if packed else ", ".join(names[:5]) or "nothing"


def scan(root):
    """image_files of a data set."""
    found = image_files(root)
    if not found:
        raise Complaint(f"--data: {root}: no images in it or below (found {inside(root)})")
    return found


def root_and_rest(where):
    """DIR:a:b -> (DIR, ["a", "b"]); a folder's own name may hold a colon."""
    parts = where.split(":")
    for k in range(len(parts), 0, -1):
        if os.path.isdir(":".join(parts[:k])):
            return ":".join(parts[:k]), parts[k:]
    return parts[0], parts[1:]


def first_folder(root, *names):
    """The first of the sub-folders that exists, or the folder itself."""
    return next((Path(root) / n for n in names if (Path(root) / n).is_dir()), Path(root))


def samples_of(name, paths, y, place, split, classes, places, notes=(), **more):
    """Samples of photos; y, place, split: anything that makes a LongTensor."""
    y, place, split = (torch.as_tensor(v, dtype=torch.long) for v in (y, place, split))
    captions = [[f"a {c} on {p}" if len(places) > 1 else f"a {c}" for p in places] for c in classes]
    return Samples(name, [Photo(p) for p in paths], y, place, split, list(classes), list(places),
                   [captions[a][b] if a >= 0 else "" for a, b in zip(y.tolist(), place.tolist())], [None] * len(paths), list(notes), **more)


def make_splits(group, shares=(.6, .2, .2)):
    """Splits [n] by a rule: of each group [n] the shares for train, val and test, drawn the same for the same files in order."""
    group, split = np.asarray(group), np.zeros(len(group), np.int64)
    order = np.argsort(group, kind="stable")
    for g, members in zip(*_runs(group[order], order)):
        members = members[rng(0, "split", int(g) + 1).permutation(len(members))]
        split[members] = np.searchsorted(np.cumsum(shares)[:2], (np.arange(len(members)) + .5) / len(members), side="right")
    return split


def _runs(values, items):
    """Sorted values and items alike -> the distinct values, and the items of each."""
    distinct, starts = np.unique(values, return_index=True)
    return distinct, np.split(items, starts[1:])


def complete_splits(split, group, notes):
    """Splits with no val: a fifth of train becomes val; with no test: val becomes test. Says so in notes."""
    split = np.asarray(split)
    if (split == 0).any() and (split == 1).any() and not (split == 2).any():
        notes.append("no test split: val is used as test")
        split = np.where(split == 1, 2, split)
    if (split == 0).any() and not (split == 1).any():
        notes.append("no val split: a fifth of the training images of each group is used as val")
        train = (split == 0).nonzero()[0]
        split = split.copy()
        split[train] = make_splits(np.asarray(group)[train], (.8, .2, 0))
    return split


def correlate(samples, own, confounder):
    """The samples with a biased training split: of each class y the share confounder stands on the place own[y].

    Further training images on other places go to test where the splits are ours, and are left out else.
    """
    expect(0 < confounder <= 1, "confounder", confounder, "a share above 0, at most 1")
    drop, reached = [], True
    for y, place in enumerate(own):
        mine = (samples.y == y) & (samples.split == 0)
        others = (mine & (samples.place != place)).nonzero()[:, 0]
        least = round(int((mine & (samples.place == place)).sum()) * (1 - confounder) / confounder)
        reached &= len(others) >= least
        drop.append(others[torch.from_numpy(rng(0, "confounder", y).permutation(len(others)))][least:])
    drop = torch.cat(drop)
    left = samples.split == 0
    left[drop] = False
    shares = [float((samples.place[left & (samples.y == y)] == p).double().mean()) for y, p in enumerate(own)]
    samples.notes.append(("" if reached else f"WARNING: --confounder={confounder:g} is not reached, there are too few images on other places; ") + "training split: "
                         + ", ".join(f"{share:.0%} of {samples.classes[y]} on {samples.places[p]}" for y, (p, share) in enumerate(zip(own, shares))))
    if not samples.official:
        samples.split[drop] = 2
        return samples
    keep = torch.ones(len(samples.y), dtype=torch.bool)
    keep[drop] = False
    return samples.keep(keep.nonzero()[:, 0])


def published(what, found, expected):
    """A note: the counts are the published ones, or a warning with both."""
    return f"{what}: the published counts" if found == expected else \
        f"WARNING: {what}: found {found}, published {expected}: incomplete or of another making; it is used as it is"


def pair_of(text, names, what):
    """'a,b' -> the numbers of two different names."""
    words = text.split(",")
    known = {plain(n): k for k, n in enumerate(names)}
    for word in words:
        if plain(word) not in known:
            raise Complaint(f"--data: no {what} {word!r}; {near(word, names)}")
    if len(words) != 2 or len({plain(w) for w in words}) != 2:
        raise Complaint(f"--data: found {text!r}, expected two different {what} names, a,b")
    return [known[plain(w)] for w in words]


def read_lines(path, flag):
    """The lines of a text file, without the empty ones: list of (number, line)."""
    if not os.path.isfile(path):
        raise Complaint(f"--{flag}={path}: " + ("not a file" if os.path.exists(path) else "no such file"))
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as problem:
        raise Complaint(f"--{flag}={path}: not a text file in UTF-8 ({problem})") from None
    lines = [(k, line.strip()) for k, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise Complaint(f"--{flag}={path}: an empty file")
    return lines


def read_classes(path):
    """--classes=FILE -> names in order; [] for no file."""
    seen = {}
    for number, name in read_lines(path, "classes") if path else ():
        if plain(name) in seen:
            raise Complaint(f"--classes={path}:{number}: two classes with the same name, {name!r}, the first in line {seen[plain(name)]}")
        seen[plain(name)] = number, name
    return [name for _, name in seen.values()]


def read_prompts(path, labels):
    """--prompts=FILE -> for each label a list of texts: its own lines class<TAB>prompt, or else every template with {}."""
    templates, own, known = [], {}, {plain(label): label for label in labels}
    for number, line in read_lines(path, "prompts"):
        name, tab, prompt = line.partition("\t")
        if tab and plain(name) not in known:
            raise Complaint(f"--prompts={path}:{number}: no class {name!r}; {near(name, labels)}")
        if not tab and "{}" not in line:
            raise Complaint(f"--prompts={path}:{number}: found {line!r}, expected a template with {{}} or class<TAB>prompt")
        (own.setdefault(plain(name), []) if tab else templates).append(prompt.strip() if tab else line)
    bare = [label for label in labels if plain(label) not in own]
    if bare and not templates:
        raise Complaint(f"--prompts={path}: no prompt for class {bare[0]!r}" + f" and {len(bare) - 1} more" * (len(bare) > 1)
                        + "; add a line class<TAB>prompt for each, or a template with {}")
    return [[t.replace("{}", label) for t in own.get(plain(label), templates)] for label in labels]


def read_columns(path, needed, hint):
    """A CSV file (comma, semicolon or tab) -> dict column -> list of strings, fast enough for millions of rows."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=head.count)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise Complaint(f"{path}: not a CSV file in UTF-8 ({problem})") from None
    header, rows = (rows[0], rows[1:]) if len(rows) > 1 else ([], [])
    for column in needed:
        if column not in header:
            raise Complaint(f"{path}: no column {column!r} (found: {', '.join(header) or 'no rows'}); {hint}")
    odd = next((k for k, row in enumerate(rows) if len(row) != len(header)), None)
    if odd is not None:
        raise Complaint(f"{path}:{odd + 2}: {len(rows[odd])} fields ({delimiter.join(rows[odd])[:60]!r}), expected {len(header)} as in its first line")
    return dict(zip(header, zip(*rows)))


def whole(path, columns):
    """Columns of strings -> list of int64 arrays; Complaint names the line of the first that is no whole number from 0 (split: 0 to 2)."""
    n, out = len(next(iter(columns.values()))), []
    for column, values in columns.items():
        numbers = {v: int(v) if v.strip().isdecimal() else -1 for v in set(values)}
        bad = {v for v, k in numbers.items() if not 0 <= k < (3 if column == "split" else max(3, n))}
        if bad:
            line = next(k for k, v in enumerate(values) if v in bad)
            raise Complaint(f"{path}:{line + 2}: " + " ".join(f"{c}={v[line]!r}" for c, v in columns.items())
                            + ", expected whole numbers from 0" + ", split 0 (train), 1 (val) or 2 (test)" * ("split" in columns))
        out.append(np.fromiter(map(numbers.__getitem__, values), np.int64, n))
    return out


def files_in(root, table, column, names):
    """Names of images relative to root -> (paths that exist, their index LongTensor, notes). A path out of root, one listed
    twice, or none that exists is a Complaint; missing ones are counted in one note."""
    text = "\n".join(names)
    if ("./" in text or "//" in text) and ".." not in text:  # ./a.png is a.png
        names = [os.path.normpath(name) if name and name[0] != "/" else name for name in names]
    distinct = set(names)
    if ".." in text or not all(names) or any(n[0] in "/\\" for n in names) or len(distinct) < len(names):
        seen = {}
        for line, name in enumerate(names, 2):
            if not name or name[0] in "/\\" or ".." in Path(name).parts or Path(name).is_absolute():
                raise Complaint(f"{table}:{line}: {column} {name!r}, expected a path inside {root}")
            if name in seen:
                raise Complaint(f"{table}:{line}: {column} {name!r} is listed already in line {seen[name]}; list each image once")
            seen[name] = line
    there = set()
    for at in {n[:n.rfind("/") + 1] for n in names}:
        if os.path.isdir(os.path.join(root, at)):
            there.update(at + file for file in os.listdir(os.path.join(root, at)))
    lost, here, notes = distinct - there, np.arange(len(names)), []
    if lost:
        first = next(n for n in names if n in lost)
        line = f"{table}: {len(lost)} of its {len(names)} images do not exist, the first is {os.path.join(root, first)}"
        if len(lost) == len(names):
            raise Complaint(f"{line} (in the folder: {inside(root) if os.path.isdir(root) else 'no such folder'}); complete the folder")
        notes.append(f"WARNING: {line}; they are left out")
        here = np.array([k for k, name in enumerate(names) if name not in lost])
    root = os.path.join(root, "")
    return [root + names[k] for k in here.tolist()], torch.from_numpy(here), notes


# ---------------------------------------------------------------------------------------------------------------------
# data sets on disk: one function each; DATA says where they are from and how they look

def image_folder(root, given=()):
    """folder:DIR. given: names of --classes. Splits of our own where there are no folders for them."""
    root = folder(root, "data folder")
    paths, notes = scan(root), []
    top = {p[0] for p in paths if len(p) > 1}
    splits = {t for t in top if t.lower() in SPLIT_NAMES}
    official = bool(splits) and splits == top
    if len(splits) > 1 and not official:
        raise Complaint(f"--data=folder:{root}: {', '.join(sorted(splits))} are splits, but {min(top - splits)!r} beside them is not; remove or rename it")
    rest = [p[1:] if official and len(p) > 1 else p for p in paths]
    if all(len(r) == 1 for r in rest):  # no class folders
        if not given:
            raise Complaint(f"--data=folder:{root}: {len(paths)} images and no class folders; give --classes=FILE, the names to choose from, "
                            "or lay it out as --data=folder:help says")
        none = [0] * len(paths)
        return samples_of(f"folder:{root}", [os.path.join(root, *p) for p in paths], [-1] * len(paths), none, [2] * len(paths), given, ["anywhere"],
                          [f"{len(paths)} images without labels"])
    stray = sum(len(r) == 1 for r in rest)
    if stray:
        notes.append(f"WARNING: {root}: {stray} images lie outside the class folders, they are left out")
        paths, rest = zip(*[(p, r) for p, r in zip(paths, rest) if len(r) > 1])
    classes = list(given) or sorted({r[0] for r in rest})
    known = {plain(c): k for k, c in enumerate(classes)}
    unknown = sorted({r[0] for r in rest if plain(r[0]) not in known})
    if unknown:
        raise Complaint(f"--classes: no name {unknown[0]!r}, which is a folder in {root}; {near(unknown[0], classes)}")
    deep = [len(r) > 2 for r in rest]
    if any(deep) and not all(deep):
        notes.append(f"WARNING: {root}: {deep.count(False)} images lie beside the place folders of their class; their place is 'elsewhere'")
    place_names = [r[1] if len(r) > 2 else "elsewhere" if any(deep) else "anywhere" for r in rest]
    places = sorted(set(place_names))
    y, place = [known[plain(r[0])] for r in rest], [places.index(p) for p in place_names]
    group = np.array(y) * len(places) + place
    split = complete_splits([SPLIT_NAMES[p[0].lower()] for p in paths], group, notes) if official else make_splits(group)
    return samples_of(f"folder:{root}", [os.path.join(root, *p) for p in paths], y, place, split, classes, places, notes, official=official)


def csv_groups(path, given=()):
    """csv:FILE, any table of images and groups."""
    if not os.path.isfile(path):
        raise Complaint(f"--data=csv:{path}: " + ("a folder, expected a file" if os.path.isdir(path) else "no such file"))
    found, root, notes = read_columns(path, (), ""), os.path.dirname(path) or ".", []
    pick = lambda *names: next((n for n in names if n in found), None)
    file, label, where = pick("path", "filename", "img_filename"), pick("y", "label"), pick("place", "group")
    for column, wanted in ((file, "path"), (label, "y")):
        if column is None:
            raise Complaint(f"{path}: no column {wanted!r} (found: {', '.join(found) or 'no rows'}); --data=csv:help says which there may be")

    def numbered(column, names):
        """Numbers or names -> (int64 array, names)."""
        values = found[column]
        if column == "y" or names == () and all(v.isdecimal() for v in set(values)):
            numbers = whole(path, {column: values})[0]
            names = list(names) or [str(k) for k in range(numbers.max() + 1)]
            if numbers.max() >= len(names):
                raise Complaint(f"{path}: y={numbers.max()}, but --classes has {len(names)} names")
            return numbers, names
        names = list(names) or sorted(set(values))
        known = {plain(n): k for k, n in enumerate(names)}
        code = {v: known.get(plain(v), -1) for v in set(values)}
        wrong = next((k for k, v in enumerate(values) if code[v] < 0), None)
        if wrong is not None:
            raise Complaint(f"{path}:{wrong + 2}: {column}={values[wrong]!r} is not in --classes; {near(values[wrong], names)}")
        return np.array([code[v] for v in values]), names

    empty = next((k for k, v in enumerate(found[label]) if not v.strip()), None)
    if empty is not None:
        raise Complaint(f"{path}:{empty + 2}: {label} is empty; give every image its class")
    y, classes = numbered(label, tuple(given))
    place, places = numbered(where, ()) if where else (np.zeros(len(y), np.int64), ["anywhere"])
    group = y * len(places) + place
    if "split" in found:
        named = {v: SPLIT_NAMES.get(v.lower()) for v in set(found["split"])}
        split = np.array([named[v] for v in found["split"]]) if None not in named.values() else whole(path, {"split": found["split"]})[0]
        split = complete_splits(split, group, notes)
    else:
        split = make_splits(group)
    names = found[file]
    if all(map(os.path.isabs, names)):
        root = os.path.commonpath({os.path.dirname(name) for name in names})
        names = [name[len(root):].lstrip("/") for name in names]
    paths, index, lost = files_in(root, path, file, names)
    y, place, split = (torch.from_numpy(v)[index] for v in (y, place, split))
    return samples_of(f"csv:{path}", paths, y, place, split, classes, places, notes + lost, official="split" in found)


def celeba(root):
    """celeba:DIR, y = Blond_Hair, place = Male, as in group_DRO."""
    root = folder(root, "data celeba")
    tables = {}
    for name in ("list_attr_celeba", "list_eval_partition"):
        found = [root / sub / f"{name}.{kind}" for sub in ("", "Anno", "Eval") for kind in ("txt", "csv")]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            raise Complaint(f"{root}: no {name}.txt or .csv in it (found {inside(root)}); --data=celeba:help says what it must hold")
        tables[name] = path, [line.replace(",", " ").split() for _, line in read_lines(path, "data")]
    path, rows = tables["list_attr_celeba"]
    rows = rows[1:] if len(rows[0]) == 1 else rows  # the official file begins with the number of rows
    header = rows[0][1:] if rows[0][0] == "image_id" else rows[0]
    at = []
    for column in ("Blond_Hair", "Male"):
        if column not in header:
            raise Complaint(f"{path}: no column {column!r} (found: {', '.join(header[:5])}, ...); expected the official table of 40 attributes")
        at.append(header.index(column) + 1)
    short = next((k for k, row in enumerate(rows[1:]) if len(row) != len(header) + 1), None)
    if short is not None:
        raise Complaint(f"{path}: the row of {rows[short + 1][0]} has {len(rows[short + 1]) - 1} attributes, expected {len(header)}")
    names, attributes = [r[0] for r in rows[1:]], np.array([[r[a] for a in at] for r in rows[1:]]) == "1"
    partition, rows = tables["list_eval_partition"]
    part = {r[0]: r[1] for r in rows if len(r) > 1 and r[1] in ("0", "1", "2")}
    bare = [n for n in names if n not in part]
    if bare:
        raise Complaint(f"{partition}: no row for {bare[0]} and {len(bare) - 1} more of {path.name}; take both files from one source")
    images = first_folder(root, "img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
    paths, index, notes = files_in(images, path, "image_id", names)
    y, place = (torch.from_numpy(attributes[:, k].astype(np.int64))[index] for k in (0, 1))
    split = torch.tensor([int(part[n]) for n in names])[index]
    samples = samples_of(f"celeba:{root}", paths, y, place, split, ("dark hair", "blond hair"), ("female", "male"), notes)
    samples.captions = [f"a photo of a {samples.places[b]} celebrity with {samples.classes[a]}" for a, b in zip(y.tolist(), place.tolist())]
    notes = published("CelebA, groups dark female, dark male, blond female, blond male in train, val, test", [samples.counts(s).tolist() for s in range(3)],
                      [[71629, 66874, 22880, 1387], [8535, 8276, 2874, 182], [9767, 7535, 2480, 180]])
    samples.notes.append(notes)
    return samples


def imagenet_names(column=1):
    """ImageNet's 1000 classes from assets/: 0 WordNet id, 1 all names of the synset, 2 the short name that CLIP's authors use."""
    lines = (Path(__file__).parent / "assets/imagenet.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[column] for line in lines]


def counteranimal(root, pair="", confounder=1.):
    """counteranimal:DIR. Places are common and counter; those of a pair are the backgrounds by name, which it swaps."""
    outer = folder(root, "data counteranimal")
    numbered = lambda name: name.split(" ")[0].isdecimal() and " " in name
    root = next((p for p in (outer, outer / "LAION-final", *sorted(q for q in outer.iterdir() if q.is_dir()))
                 if p.is_dir() and any(numbered(q.name) and q.is_dir() for q in p.iterdir())), None)
    if root is None:
        raise Complaint(f"{outer}: no class folders such as '9 ostrich' in it (found {inside(outer)}); --data=counteranimal:help says how it looks")
    rows, notes, skipped = [], [], set()
    for parts in scan(root):
        kind = parts[1].lower() if len(parts) > 2 else ""
        head, _, background = kind.partition("-")
        head = head if any(w in head for w in ("common", "easy", "counter", "hard")) else kind
        place = 0 if "common" in head or "easy" in head else 1 if "counter" in head or "hard" in head else None
        if place is None or not numbered(parts[0]) or int(parts[0].split(" ")[0]) > 999:
            skipped.add("/".join(parts[:2]))
            continue
        rows.append((parts[0], place, background or kind, os.path.join(root, *parts)))
    if skipped:
        notes.append(f"WARNING: {root}: {len(skipped)} files or folders are neither common nor counter, the first is {sorted(skipped)[0]}; they are left out")
    if not rows:
        raise Complaint(f"{root}: no photos in common-... and counter-... folders; --data=counteranimal:help says how it looks")
    folders = sorted({r[0] for r in rows}, key=lambda name: int(name.split(" ")[0]))
    classes, indices = zip(*[(name.split(" ", 1)[1], int(name.split(" ")[0])) for name in folders])
    if pair:
        chosen = pair_of(pair, classes, "class")
        rows = [r for r in rows if r[0] in [folders[k] for k in chosen]]
        folders, classes, indices = ([v[k] for k in chosen] for v in (folders, classes, indices))
    else:
        counts = [len(folders), *[sum(r[1] == k for r in rows) for k in (0, 1)]]
        notes.append(published("CounterAnimal, classes, common, counter photos", counts, [45, 7174, 5926]))
    y, common = [folders.index(r[0]) for r in rows], np.array([r[1] == 0 for r in rows])
    places = sorted({r[2] for r in rows}) if pair else ["common", "counter"]
    place = [places.index(r[2]) if pair else r[1] for r in rows]
    group = np.array(y) * 2 + ~common
    split = np.where(common, make_splits(group), make_splits(group, (.2, .2, .6) if pair else (0, .2, .8)))
    names = imagenet_names()
    own = next((p / "imagenet_names.txt" for p in (root, outer) if (p / "imagenet_names.txt").is_file()), None)
    if own:
        listed = dict(line.split("\t")[:2] for _, line in read_lines(own, "data") if "\t" in line)
        if set(listed) >= {str(k) for k in range(1000)}:
            names = [listed[str(k)].strip() for k in range(1000)]
        else:
            notes.append(f"WARNING: {own}: {len(listed)} names, expected idx<TAB>name for 0 to 999; the names in assets/imagenet.tsv are used")
    samples = samples_of(f"counteranimal:{root}" + f":{pair}" * bool(pair), [r[3] for r in rows], y, place, split, classes, places, notes,
                         labels=[names[k] for k in indices] if pair else names, imagenet=[[k] for k in indices], official=False)
    if pair and any(not (common & (np.array(y) == k)).any() for k in range(2)):
        raise Complaint(f"{root}: no common photos of {pair}")
    return correlate(samples, [int(np.bincount(np.array(place)[common & (np.array(y) == k)]).argmax()) for k in range(2)], confounder) if pair else samples


NICO_CONTEXTS = ("autumn", "dim", "grass", "outdoor", "rock", "water")


def nico(root, pair="", contexts="", confounder=1.):
    """nico:DIR, NICO++. Which contexts the published pairs stand on is not public: by default the two on which the smallest of
    the four groups is largest. The older NICO has class/context folders; where the contexts are known by name that is seen."""
    outer, notes = folder(root, "data nico"), []
    around = {p.name for p in outer.iterdir() if p.is_dir()} <= {"train", "test", "val", "NICO_DG", "public_dg_0416", "track_1"}  # "train" is a class too
    root = first_folder(outer, "train", "NICO_DG", "public_dg_0416/train", "track_1/public_dg_0416/train") if around else outer
    paths = [p for p in scan(root) if len(p) > 2]
    first, second = ({plain(p[k]) for p in paths} for k in (0, 1))
    if not paths:
        raise Complaint(f"{root}: no images in context/class/ folders (found {inside(root)}); --data=nico:help says how it looks")
    known = {*NICO_CONTEXTS, *map(plain, contexts.split(","))} - {""}
    swap = known & second and not known & first or pair and plain(pair.split(",")[0]) in first - second
    if swap:
        notes.append(f"WARNING: {root}: class/context folders, NICO++ has context/class; read as class/context")
    classes, places = (sorted({p[k] for p in paths}) for k in ((0, 1) if swap else (1, 0)))
    y, place = ([names.index(p[k]) for p in paths] for k, names in zip((0, 1) if swap else (1, 0), (classes, places)))
    y, place = np.array(y), np.array(place)
    if not pair:
        notes.append(published("NICO++, classes, contexts, images", [len(classes), len(places), len(paths)], [60, 6, 88866]))
        return samples_of(f"nico:{root}", [os.path.join(root, *p) for p in paths], y, place, make_splits(y * len(places) + place), classes, places, notes,
                          official=False)
    a, b = pair_of(pair, classes, "class")
    n = np.stack([np.bincount(place[y == k], minlength=len(places)) for k in (a, b)])  # [2, places]
    if contexts:
        p, q = pair_of(contexts, places, "context")
    elif len(places) < 2:
        raise Complaint(f"{root}: one context only, {places[0]}; a pair needs two")
    else:
        least, p, q = max((min(n[:, p].min(), n[:, q].min()), -p, -q) for p in range(len(places)) for q in range(len(places)) if p != q)
        p, q = -p, -q
    if n[:, [p, q]].min() < 5:
        raise Complaint(f"{root}: {pair} on {places[p]},{places[q]}: {n[:, [p, q]].min()} images in the smallest group, expected at least 5; "
                        "name other contexts, nico:DIR:a,b:context,context")
    keep = (np.isin(y, (a, b)) & np.isin(place, (p, q))).nonzero()[0]
    y, place = (y[keep] == b).astype(np.int64), (place[keep] == q).astype(np.int64)
    samples = samples_of(f"nico:{root}:{pair}", [os.path.join(root, *paths[k]) for k in keep], y, place, make_splits(y * 2 + place),
                         [classes[a], classes[b]], [places[p], places[q]], notes, official=False)
    return correlate(samples, [0, 1], confounder)


MEN = set("man men boy boys male males gentleman gentlemen guy guys father fathers dad son sons brother brothers husband groom he him his himself".split())
WOMEN = set("woman women girl girls female females lady ladies mother mothers mom daughter daughters sister sisters wife bride she her hers herself".split())


def cocogender(root, objects="sports,kitchen", confounder=1.):
    """cocogender:DIR, by the rule in DATA["cocogender"]."""
    root = folder(root, "data cocogender")
    notes = root / "annotations" if (root / "annotations").is_dir() else root
    parts = sorted(p.name.removeprefix("captions_").removesuffix(".json") for p in notes.glob("captions_*.json"))
    if not parts:
        raise Complaint(f"{notes}: no captions_*.json in it (found {inside(notes)}); the gender is read from COCO's captions: get annotations_trainval")
    kinds = [set(k.split("+")) for k in objects.split(",")]
    if len(kinds) != 2:
        raise Complaint(f"--data: found {objects!r}, expected two kinds of objects, for instance sports,kitchen")
    rows, lines, left, lost, known = [], [], 0, [], {}
    for part in parts:
        captions, instances = (read_json(notes / f"{what}_{part}.json") for what in ("captions", "instances"))
        try:
            left += coco_part(root, part, captions, instances, kinds, rows, lines, lost, known)
        except (KeyError, TypeError) as problem:
            raise Complaint(f"{notes}/captions_{part}.json, instances_{part}.json: no {problem} in it, or in an entry; expected COCO's format") from None
    if not rows:
        raise Complaint(f"{root}: no image of a man or a woman with {objects} objects" + (f"; {len(lost)} do not exist, the first is {lost[0]}" if lost else ""))
    said = [f"COCO gender: {len(rows)} images fit the rule, {left} do not"]
    if lost:
        said.append(f"WARNING: {root}: {len(lost)} of {len(lost) + len(rows)} images do not exist, the first is {lost[0]}; they are left out")
    y, place, split = np.array(rows).T
    official = len(set(split)) > 1
    split = complete_splits(split, y * 2 + place, said) if official else make_splits(y * 2 + place)
    samples = samples_of(f"cocogender:{root}", lines, y, place, split, ("man", "woman"), objects.split(","), said, official=official)
    samples.captions = [f"a {samples.classes[a]} with {samples.places[b]} objects" for a, b in zip(y.tolist(), place.tolist())]
    return correlate(samples, [0, 1], confounder)


def coco_part(root, part, captions, instances, kinds, rows, lines, lost, known):
    """Adds to rows (gender, place, split), lines (paths), lost (paths) and known (photo's number to part) what one part of COCO has;
    returns how many fit no group."""
    left = 0
    of = [{c["id"] for c in instances["categories"] if {c["name"], c.get("supercategory")} & kind} for kind in kinds]
    for kind, ids in zip(kinds, of):
        if not ids:
            there = {c["name"] for c in instances["categories"]} | {c.get("supercategory", "") for c in instances["categories"]}
            raise Complaint(f"--data: {'+'.join(kind)!r} is no category of instances_{part}.json; {near(min(kind), there)}")
    words, seen = {}, {}
    for a in captions["annotations"]:
        words.setdefault(a["image_id"], set()).update("".join(c if c.isalpha() else " " for c in a["caption"].lower()).split())
    for a in instances["annotations"]:
        seen.setdefault(a["image_id"], set()).add(a["category_id"])
    images = first_folder(root, part, f"images/{part}", "images")
    there = set(os.listdir(images))
    for image in sorted(captions["images"], key=lambda i: i["id"]):
        who = [bool(words.get(image["id"], set()) & w) for w in (MEN, WOMEN)]
        what = [bool(seen.get(image["id"], set()) & ids) for ids in of]
        if image["file_name"] in there and known.setdefault(image["id"], part) != part:  # of 2014 and 2017: it would be in train and in test
            raise Complaint(f"{root}: {part} has photos that {known[image['id']]} has too (the first is number {image['id']}); keep the files of one year")
        if sum(who) != 1 or sum(what) != 1:
            left += 1
        elif image["file_name"] not in there:
            lost.append(str(images / image["file_name"]))
        else:
            rows.append((who.index(True), what.index(True), 2 if "val" in part else 0))
            lines.append(str(images / image["file_name"]))
    return left


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Complaint(f"{path}: no such file (in the folder: {inside(Path(path).parent)})") from None
    except ValueError as problem:
        raise Complaint(f"{path}: not JSON ({problem})") from None


IN9 = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")


def in9(root):
    """in9:DIR. Splits of our own, the same for all variations of one photo, so that no photo is in two."""
    outer = folder(root, "data in9")
    root = first_folder(outer, "bg_challenge")
    places = [v for v in IN9 if (root / v).is_dir()]
    if not places:
        raise Complaint(f"{root}: none of the folders {', '.join(IN9[:3])} ... in it (found {inside(root)}); --data=in9:help says how it looks")
    rows = [(v, *p) for v in places for p in scan(first_folder(root / v, "val")) if len(p) == 2]
    if not rows:
        raise Complaint(f"{root}: no images in {places[0]}/val/00_dog/ and so on; --data=in9:help says how it looks")
    folders = sorted({r[1] for r in rows})
    classes = [f.split("_", 1)[1].replace("_", " ") if f[:2].isdecimal() and "_" in f else f for f in folders]
    counts = {v: sum(r[0] == v for r in rows) for v in places}
    notes = [published("ImageNet-9, images of each variation", counts, {v: 4050 for v in places})]
    if len(folders) != 9:
        notes.append(f"WARNING: {root}: {len(folders)} classes, ImageNet-9 has nine")
    photo = ["_".join(r[2].rsplit(".", 1)[0].split("_")[:2]) for r in rows]  # n02085936_10130, the foreground's
    share = np.array([zlib.crc32(p.encode()) % 1000 / 1000 for p in photo])
    mapping = next((p for p in (root / "in_to_in9.json", outer / "in_to_in9.json") if p.is_file()), None)
    try:
        imagenet = [[int(k) for k, v in read_json(mapping).items() if int(v) == c] for c in range(len(folders))] if mapping else []
    except (ValueError, TypeError, AttributeError):
        raise Complaint(f"{mapping}: expected {{\"ImageNet label\": class 0 to 8 or -1, ...}}") from None
    where = [os.path.join(first_folder(root / r[0], "val"), r[1], r[2]) for r in rows]
    return samples_of(f"in9:{root}", where, [folders.index(r[1]) for r in rows], [places.index(r[0]) for r in rows],
                      np.searchsorted([.6, .8], share, side="right"), classes, places, notes, imagenet=imagenet, official=False)


def imagenet(root):
    """imagenet:DIR, 1000 classes; by WordNet id where the names have it, so that some may be missing, else by their order."""
    outer, notes = folder(root, "data imagenet"), []
    root = first_folder(outer, "val")
    paths, ids = scan(root), imagenet_names(0)
    number = {w: k for k, w in enumerate(ids)}
    label = lambda p: p[0] if len(p) > 1 else p[0].split("_")[0].split(".")[0]
    found = sorted({label(p) for p in paths})
    if set(found) <= set(number):
        y = [number[label(p)] for p in paths]
    elif len(found) == 1000 and all(len(p) > 1 for p in paths):
        y = [found.index(label(p)) for p in paths]
    elif len(paths) == 1000 and all(len(p) == 1 for p in paths):
        y = list(range(1000))
    else:
        raise Complaint(f"{root}: {len(paths)} images in {len({p[0] for p in paths if len(p) > 1})} folders, the first is {'/'.join(paths[0])}; "
                        "expected folders n01440764 ..., or 1000 of them, or 1000 files, in the order of classes")
    notes += [f"WARNING: {root}: {len(set(y))} of 1000 classes"] if len(set(y)) < 1000 else []
    short = imagenet_names(2)
    classes = [f"{n} ({w})" if short.count(n) > 1 else n for n, w in zip(short, ids)]
    return samples_of(f"imagenet:{outer}", [os.path.join(root, *p) for p in paths], y, [0] * len(paths), make_splits(y), classes, ["anywhere"], notes,
                      labels=short, imagenet=[[k] for k in range(1000)], official=False)
# ---------------------------------------------------------------------------------------------------------------------
# regions, and what discover.py found out about them

def grid(spec):
    """Boxes x1, y1, x2, y2 of "grid:3" or, in several scales, "grid:1,2,3": shares of what the model sees, float [R, 4],
    row by row."""
    sides = [int(n) if n.isdigit() else 0 for n in spec.removeprefix("grid:").split(",")]
    if not spec.startswith("grid:") or not all(0 < n <= 64 for n in sides):
        raise Complaint(f"--regions: found {spec!r}, expected grid:N or grid:N,N,... with N from 1 to 64")
    return torch.tensor([(c / n, r / n, (c + 1) / n, (r + 1) / n) for n in sides for r in range(n) for c in range(n)])


def drawn_regions(n, D, seed=0, C=10, per=4):
    """Region embeddings with a planted spurious feature, for benchmarks and tests: images of `per` regions, one shows the class's object,
    the rest one of 12 grounds, or, in every second image, the feature, which pulls its image toward class 0. All from one generator.

    n: regions, D: dimensions. Returns a dict with the arrays of discover.py's --embeddings, torch, reg_emb [n, D] unit-norm.
    """
    if n < per * C or D < 2:
        raise Complaint(f"--embeddings=random:{n},{D}: expected at least {per * C} regions and 2 dimensions")
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.nn.functional.normalize(torch.randn(*size, generator=generator), dim=-1)
    text, grounds = normal(C, D), normal(12, D)
    feature = torch.nn.functional.normalize(normal(D) + .25 * text[0], dim=0)
    kinds = torch.cat([text, grounds, feature[None]])
    images, x = n // per, torch.empty(n, D)
    y, has = (torch.randint(high, (images,), generator=generator) for high in (C, 2))
    kind = C + torch.randint(12, (n,), generator=generator)
    first = torch.arange(images) * per
    kind[first], kind[first + 1] = y, torch.where(has == 1, C + 12, kind[first + 1])
    for a in range(0, n, 1 << 16):
        part = kinds[kind[a:a + (1 << 16)]]
        x[a:a + (1 << 16)] = torch.nn.functional.normalize(part + .8 * normal(*part.shape), dim=1)
    share = lambda: torch.rand(images, 1, generator=generator)
    other = text[torch.randint(C, (images,), generator=generator)]
    z = (.2 + .5 * share()) * text[y] + .5 * share() * other + .3 * has[:, None] * (feature + text[0]) + .3 * normal(images, D)
    count = torch.full((images,), per)
    count[-1] += n - per * images
    return dict(reg_emb=x, num_regions=count, true_label=y, text_emb=text, img_emb=torch.nn.functional.normalize(z, dim=1), region_target=(kind == C + 12).long())


def load_embeddings(name, span):
    """The arrays of discover.py's --embeddings=FILE.npz, checked; of reg_emb [N, D] only the rows that span(N) names, (first, last + 1),
    float32, no more than a piece of it in memory beside. Returns them in a dict, with notes; region_target and class_names None if they are missing."""
    if not os.path.isfile(name):
        raise Complaint(f"--embeddings={name}: no such file")
    need, notes = ("reg_emb", "num_regions", "true_label", "text_emb", "img_emb"), []
    try:
        with np.load(name, allow_pickle=False) as file:
            missing = [a for a in need if a not in file.files]
            if missing:
                raise Complaint(f"{name}: no array {missing[0]!r} (found: {', '.join(file.files)}); expected {', '.join(need)}")
            count, y, text, z = (torch.from_numpy(a.astype(np.int64) if a.dtype.kind in "iu" else np.ascontiguousarray(a))
                                 for a in map(file.__getitem__, need[1:]))
            target = torch.from_numpy(file["region_target"].astype(np.float32)) if "region_target" in file.files else None
            names = [str(c) for c in file["class_names"]] if "class_names" in file.files else None
            with file.zip.open("reg_emb.npy") as stream:
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(stream)[0]]
                shape, fortran, kind = read(stream)
                if len(shape) != 2 or text.dim() != 2 or z.dim() != 2 or not shape[1] == text.shape[1] == z.shape[1] or min(shape[1], len(text)) == 0:
                    raise Complaint(f"{name}: reg_emb {list(shape)}, text_emb {list(text.shape)}, img_emb {list(z.shape)}; expected [N, D], [C, D], [n, D] with one D")
                low, high = span(shape[0])
                if fortran or kind.hasobject:
                    x = np.ascontiguousarray(file["reg_emb"][low:high], np.float32)
                else:
                    x, size = np.empty((high - low, shape[1]), np.float32), kind.itemsize * shape[1]
                    stream.seek(low * size, 1)
                    for a in range(0, high - low, 1 << 16):
                        b = min(a + (1 << 16), high - low)
                        x[a:b] = np.frombuffer(stream.read((b - a) * size), kind).reshape(b - a, -1)
    except Complaint:
        raise
    except Exception as problem:  # whatever a damaged file makes of itself
        raise Complaint(f"{name}: not an .npz file of plain arrays ({type(problem).__name__}: {problem})") from None
    if not count.dim() == y.dim() == 1 or not len(count) == len(y) == len(z) or count.is_floating_point() or y.is_floating_point() \
            or int(count.sum()) != shape[0] or (len(count) and count.min() < 0):
        raise Complaint(f"{name}: num_regions {list(count.shape)} with sum {float(count.sum()):g}, true_label {list(y.shape)}, img_emb {list(z.shape)} and "
                        f"reg_emb {list(shape)}; expected whole numbers [n], [n], with one row of reg_emb for each region")
    if target is not None and target.shape != (shape[0],) or names is not None and len(names) != len(text):
        raise Complaint(f"{name}: region_target {None if target is None else list(target.shape)}, {'no' if names is None else len(names)} class_names; "
                        f"expected [{shape[0]}] and {len(text)}")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(text):
        raise Complaint(f"{name}: true_label from {int(y.min())} to {int(y.max())}, text_emb has {len(text)} classes; expected 0 to {len(text) - 1}")
    if names and len(set(names)) < len(names):
        raise Complaint(f"{name}: class_names lists {next(c for c in names if names.count(c) > 1)!r} twice; expected different names")
    x = torch.from_numpy(x)
    for what, t in (("reg_emb", x), ("img_emb", z), ("text_emb", text)):
        norm = torch.cat([part.float().norm(dim=1) for part in t.split(1 << 16)])
        if what != "reg_emb" and (not norm.isfinite().all() or not norm.all()):
            raise Complaint(f"{name}: {what} has a row that is zero or not finite (row {int((~norm.isfinite() | (norm == 0)).nonzero()[0])})")
        if len(norm) and (norm - 1).abs().max() > 1e-3:
            notes.append(f"{name}: {what} is not unit-norm (norms {norm.min():.3g} to {norm.max():.3g}); normalised")
    return dict(reg_emb=x, num_regions=count.long(), true_label=y.long(), text_emb=text.float(), img_emb=z, region_target=target, class_names=names, notes=notes)


@dataclass(frozen=True)
class Crop:
    """A part of a picture; box: x1, y1, x2, y2, shares of its width and height."""
    picture: object
    box: tuple

    def image(self):
        image = decoded(self.picture)
        left, top, right, bottom = (round(v * n) for v, n in zip(self.box, image.size * 2))
        left, top = min(left, image.width - 1), min(top, image.height - 1)
        return image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))

    def key(self):
        return f"crop {self.picture.key()} {self.box}"


@functools.lru_cache(16)
def decoded(picture):
    """picture.image(), kept while its crops are taken one after the other."""
    return picture.image()


@dataclass(frozen=True)
class Regions:
    """A picture and regions in it. boxes: R times x1, y1, x2, y2, shares of the picture; frame: the box that the model sees of it.
    mask, values: the regions are the pixels of a mask that have these values, or fall between the half-way marks; boxes hold them."""
    picture: object
    boxes: tuple
    frame: tuple
    mask: str = ""
    values: tuple = ()

    def image(self):
        return self.picture.image()

    def key(self):
        return f"{self.picture.key()} regions {zlib.crc32(repr((self.boxes, self.values)).encode())} {self.mask and Photo(self.mask).key()}"

    def seen(self):
        """The boxes in shares of what the model sees, [R, 4], what lies outside cut off."""
        left, top, right, bottom = self.frame
        origin, side = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
        return ((torch.tensor(self.boxes).view(-1, 4) - origin) / side).clamp(0, 1)

    def weights(self, h, w):
        """The masks' regions as shares of the cells of a map, [R, h, w]."""
        image = open_image(self.mask).convert("L") if self.values else Image.new("L", (8, 8))
        frame = [v * n for v, n in zip(self.frame, image.size * 2)]
        m = np.asarray(image)
        shrunk = lambda on: np.array(Image.fromarray(255 * on.astype(np.uint8)).resize((w, h), Image.BOX, frame), np.float32) / 255
        return torch.stack([torch.from_numpy(shrunk(m == v)) for v in self.values]) if self.values else torch.zeros(0, h, w)


def picture_size(picture):
    """(width, height) of a picture; of a file from its head."""
    if getattr(picture, "pose", None) or isinstance(picture, Quadrants):
        return picture.size, picture.size
    if not isinstance(picture, Photo):
        return picture.image().size
    try:
        with Image.open(picture.path) as image:
            w, h = image.size
            return (h, w) if image.getexif().get(274, 1) >= 5 else (w, h)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return open_image(picture.path).size  # complains


def load_regions(spec, pictures, frame, skip_bad=False):
    """Regions in each picture, list of Regions, and notes. spec: grid:N,N,...: of what the model sees; boxes:FILE.csv with columns
    path,x1,y1,x2,y2 in pixels; coco:FILE.json; masks:DIR, where each grey value in NAME.png is a region of NAME.jpg.
    frame: (width, height) -> the box that the model sees. skip_bad: a picture that cannot be read has no regions, instead of a Complaint,
    which comes for a box outside its picture or without area, too."""
    kind, _, where = spec.partition(":")
    sizes = {}

    def seen(picture):
        try:
            size = picture_size(picture)
        except Complaint:
            if not skip_bad:
                raise
            return (0, 0), None
        if size not in sizes:
            sizes[size] = frame(*size)
        return size, sizes[size]

    if kind == "grid":
        boxes, out = grid(spec).tolist(), []
        for picture in pictures:
            f = seen(picture)[1]
            if f is None:
                out.append(Regions(picture, (), (0., 0., 1., 1.)))
                continue
            left, top, right, bottom = f
            w, h = right - left, bottom - top
            out.append(Regions(picture, tuple((left + x1 * w, top + y1 * h, left + x2 * w, top + y2 * h) for x1, y1, x2, y2 in boxes), f))
        return out, []
    if kind not in ("boxes", "coco", "masks") or not where:
        raise Complaint(f"--regions: found {spec!r}, expected grid:N, boxes:FILE.csv, coco:FILE.json or masks:DIR")
    if kind == "masks":
        out, found = [], find_masks([getattr(p, "path", "") for p in pictures], where)
        for picture, mask in zip(pictures, found):
            f = seen(picture)[1]
            mask, f = (mask, f) if f else (None, (0., 0., 1., 1.))
            m = np.asarray(open_image(mask).convert("L")) if mask else np.zeros((1, 1))
            values = np.unique(m).tolist() if mask else []
            if len(values) > 32:
                raise Complaint(f"{mask}: {len(values)} grey values, expected at most 32, one for each region; a soft mask must be thresholded first")
            boxes = [span_of(m == v) for v in values]
            inside = [k for k, b in enumerate(boxes) if min(b[2], f[2]) > max(b[0], f[0]) and min(b[3], f[3]) > max(b[1], f[1])]
            out.append(Regions(picture, tuple(boxes[k] for k in inside), f, mask or "", tuple(values[k] for k in inside)))
        return out, []
    rows, unseen, unlisted = coco_boxes(where) if kind == "coco" else csv_boxes(where), 0, 0
    out = []
    for picture in pictures:
        (W, H), f = seen(picture)
        parts, boxes, found = Path(getattr(picture, "path", "")).parts, [], None
        for depth in range(len(parts) if f else 0, 0, -1):
            if (found := rows.get(Path(*parts[-depth:]).as_posix())) is not None:
                break
        unlisted += found is None
        for line, x1, y1, x2, y2 in found or ():
            if min(x2, W) <= max(x1, 0) or min(y2, H) <= max(y1, 0):
                raise Complaint(f"{where}: {line}: box {x1:g},{y1:g},{x2:g},{y2:g} " + ("has no area" if x2 <= x1 or y2 <= y1 else f"lies outside its picture of {W}x{H} pixels")
                                + "; expected x1 < x2 and y1 < y2, pixels of the original image")
            box = (max(0., x1 / W), max(0., y1 / H), min(1., x2 / W), min(1., y2 / H))
            if min(box[2], f[2]) - max(box[0], f[0]) > 1e-4 and min(box[3], f[3]) - max(box[1], f[1]) > 1e-4:
                boxes.append(box)
            else:
                unseen += 1
        out.append(Regions(picture, tuple(boxes), f or (0., 0., 1., 1.)))
    if not any(r.boxes for r in out):
        raise Complaint(f"{where}: no box for any of the {len(pictures)} pictures; its paths must be those of the pictures, or their ends "
                        f"(it has {', '.join(list(rows)[:2])}; a picture is {getattr(pictures[0], 'path', pictures[0])})")
    return out, ([f"{where}: {unseen} boxes lie in a margin that the model does not see, and are left out"] if unseen else []) + (
        [f"{where}: {unlisted} of {len(pictures)} pictures are not in it: they count as pictures without the feature"] if unlisted else [])


def span_of(on):
    """The box around the true pixels of an array, in shares."""
    rows, columns = np.flatnonzero(on.any(1)), np.flatnonzero(on.any(0))
    return tuple(float(v) for v in (columns[0] / on.shape[1], rows[0] / on.shape[0], (columns[-1] + 1) / on.shape[1], (rows[-1] + 1) / on.shape[0]))


def csv_boxes(path):
    """{picture: [(line, x1, y1, x2, y2)]} of a CSV with columns path,x1,y1,x2,y2."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise Complaint(f"--regions: {path}: cannot be read as CSV ({problem})") from None
    columns, found = ("path", "x1", "y1", "x2", "y2"), {}
    missing = [c for c in columns if not rows or c not in rows[0]]
    if missing:
        raise Complaint(f"{path}: no column {missing[0]!r} (found: {', '.join(map(str, rows[0])) if rows else 'no rows'}); expected {','.join(columns)}")
    for line, row in enumerate(rows, 2):
        try:
            box = [float(row[c]) for c in columns[1:]]
            if not all(map(math.isfinite, box)):
                raise ValueError
        except (TypeError, ValueError):
            raise Complaint(f"{path}: line {line}: {[row[c] for c in columns[1:]]}, expected four numbers x1,y1,x2,y2") from None
        found.setdefault((row["path"] or "").replace("\\", "/").removeprefix("./"), []).append((f"line {line}", *box))
    return found


def coco_boxes(path):
    """The same of a COCO instances file; crowds are left out."""
    try:
        tree = json.loads(Path(path).read_text())
        names, found = {i["id"]: i["file_name"] for i in tree["images"]}, {}
        for a in tree["annotations"]:
            if not a.get("iscrowd"):
                x, y, w, h = map(float, a["bbox"])
                if not all(map(math.isfinite, (x, y, w, h))):
                    raise ValueError(f"bbox {a['bbox']}")
                found.setdefault(names[a["image_id"]], []).append((f"annotation {a.get('id')}", x, y, x + w, y + h))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Complaint(f"--regions: {path}: not a COCO instances file ({type(problem).__name__}: {problem}); expected images with id, file_name and annotations with image_id, bbox") from None


def outlined(image, box):
    """A picture with a frame around a box of it, in shares."""
    image = opaque(image).copy()
    image.thumbnail((300, 300))
    corners = [min(n - 1, round(v * n)) for v, n in zip(box, image.size * 2)]
    draw, width = ImageDraw.Draw(image), max(2, max(image.size) // 80)
    draw.rectangle(corners, outline="black", width=width + 2)
    if min(corners[2] - corners[0], corners[3] - corners[1]) > 2:
        draw.rectangle([corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1], outline="#ffd23f", width=width)
    return image


def load_discovery(path):
    """What discover.py wrote: discovery.json, or its folder, with discovery.npz beside it.

    Returns a dict: kept, ids of the kept clusters, ranked; clusters, the list in discovery.json; medoids [K, D] unit-norm, one row
    for each cluster id; mean [D], taken from unit region embeddings before they are compared with medoids (zeros: none was);
    clipped, whether cosines below zero counted as zero; fingerprint, of the encoder; regions, region_encoder and data as the flags were; paths [n]; and for each region image [N] (row of
    paths), box [N, 4] (shares of the image), label [N].
    """
    path = Path(path) / "discovery.json" if Path(path).is_dir() else Path(path)
    arrays = path.with_suffix(".npz")
    for file in (path, arrays):
        if not file.is_file():
            raise Complaint(f"{file}: no such file; expected discovery.json and discovery.npz, as discover.py writes them")
    try:
        tree = json.loads(path.read_text())
        with np.load(arrays, allow_pickle=False) as file:
            found = {k: torch.from_numpy(file[k]) for k in ("medoids", "mean", "image", "box", "label")}
            found["clipped"] = bool(file["clipped"])
            found.update({k: str(file[k]) for k in ("fingerprint", "regions", "region_encoder", "data")}, paths=file["paths"].tolist())
        kept = [int(c["id"]) for c in tree["clusters"] if c["kept"]]
        if max(kept, default=0) >= len(found["medoids"]):
            raise ValueError("it has a cluster without a medoid")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        raise Complaint(f"{path}: not what discover.py writes ({type(problem).__name__}: {problem}); run it again") from None
    return dict(found, kept=kept, clusters=tree["clusters"])


# ---------------------------------------------------------------------------------------------------------------------
# tables and pages

def table(header, rows):
    """Rows of strings and numbers as aligned columns; numbers with three decimals, None as a dash."""
    show = lambda v: "-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
    cells = [[show(v) for v in row] for row in [header, *rows]]
    width = [max(len(r[c]) for r in cells) for c in range(len(header))]
    left = [c == 0 or bool(rows) and all(isinstance(row[c], str) for row in rows) for c in range(len(header))]
    line = lambda r: "  ".join(v.ljust(w) if to_left else v.rjust(w) for v, w, to_left in zip(r, width, left)).rstrip()
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in width), *map(line, cells[1:])])


def thumb(image, caption="", size=150):
    """A picture as <figure> with its bytes inside the page."""
    image = opaque(image).copy()
    image.thumbnail((2 * size, 2 * size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/jpeg;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def bars(rows, low=0., high=1.):
    """Horizontal bars with intervals. rows: (label, value, (lo, hi) or None, note), values in [low, high]."""
    at = lambda v: 100 * (min(max(v, low), high) - low) / (high - low)
    out = []
    for label, value, interval, note in rows:
        span = f'<s style="left:{at(interval[0]):.1f}%;width:{at(interval[1]) - at(interval[0]):.1f}%"></s>' if interval else ""
        out.append(f'<span>{html.escape(label)}</span><i class="track"><b style="width:{at(value):.1f}%"></b>{span}</i><span>{value:.3f} <small>{html.escape(note)}</small></span>')
    return '<div class="bars">' + "".join(out) + "</div>"


def scatter(points, xlabel, ylabel, curve=None):
    """Points in the unit square, zoomed to where they are, as SVG. points: (name, x, y, whether it stands out); curve: list of (x, y)."""
    values = [v for _, x, y, _ in points for v in (x, y)]
    low, high = max(0., math.floor(10 * min(values) - .5) / 10), min(1., math.ceil(10 * max(values) + .5) / 10)
    X, Y = (lambda v: 60 + 620 * (v - low) / (high - low)), (lambda v: 380 - 360 * (v - low) / (high - low))
    out = ['<svg viewBox="0 0 720 430" role="img">']
    for k in range(round(10 * low), round(10 * high) + 1):
        v = k / 10
        out.append(f'<path d="M{X(v):.0f} 20V380M60 {Y(v):.0f}H680" class="grid"/><text x="{X(v):.0f}" y="398" text-anchor="middle" class="dim">{v:.1f}</text>'
                   f'<text x="52" y="{Y(v) + 4:.0f}" text-anchor="end" class="dim">{v:.1f}</text>')
    out.append(f'<path d="M{X(low):.0f} {Y(low):.0f}L{X(high):.0f} {Y(high):.0f}" class="grid" stroke-dasharray="4 4"/>'
               f'<text x="370" y="424" text-anchor="middle">{html.escape(xlabel)}</text>'
               f'<text x="14" y="200" text-anchor="middle" transform="rotate(-90 14 200)">{html.escape(ylabel)}</text>')
    inside = [(x, y) for x, y in curve or () if low <= x <= high and low <= y <= high]
    if inside:
        out.append('<path d="M' + "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in inside) + '" class="interval"/>')
    taken = []
    for name, x, y, strong in sorted(points, key=lambda p: (not p[3], p[2])):
        at = Y(y) + 4
        while any(abs(at - b) < 13 and abs(X(x) - a) < 190 for a, b in taken):  # no name over another
            at -= 13
        taken.append((X(x), at))
        left = X(x) > 500
        out.append(f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="{5 if strong else 3.5}" class="{"dot" if strong else "pale"}"><title>{html.escape(name)}: {x:.3f}, {y:.3f}</title></circle>'
                   f'<text x="{X(x) + (-9 if left else 9):.1f}" y="{at:.1f}" text-anchor="{"end" if left else "start"}"{"" if strong else " class=dim"}>{html.escape(name[:34])}</text>')
    return "".join(out) + "</svg>"


def lines(curves, xlabel, ylabel):
    """Curves with bands as an SVG that stands alone. curves: name -> list of (x, dict(mean, low, high))."""
    colours, points = ("#4f8f86", "#b4703c", "#6a6fae", "#8a8f3a"), [p for curve in curves.values() for p in curve]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = math.floor(10 * min(0., *[m["low"] for _, m in points])) / 10, max(.1, math.ceil(10 * max(m["high"] for _, m in points)) / 10)
    X, Y = (lambda v: 60 + 620 * (v - x0) / (x1 - x0)), (lambda v: 340 - 300 * (v - y0) / (y1 - y0))
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" font-family="system-ui,sans-serif" font-size="13" fill="#22302d">'
           '<rect width="720" height="400" fill="#fbfaf6"/>']
    text = lambda x, y, what, how="": f'<text x="{x:.0f}" y="{y:.0f}" {how}>{html.escape(what)}</text>'
    step = 1 if y1 - y0 < .8 else 2
    for k in range(step * math.ceil(round(10 * y0) / step), round(10 * y1) + 1, step):
        out.append(f'<path d="M60 {Y(k / 10):.0f}H680" stroke="#dedbd0"/>' + text(52, Y(k / 10) + 4, f"{k / 10:.1f}", 'text-anchor="end"'))
    out += [text(X(x), 358, f"{x:g}", 'text-anchor="middle"') for x in sorted({x for x, _ in points})]
    for k, (name, curve) in enumerate(curves.items()):
        c = colours[k % len(colours)]
        band = [(x, m["high"]) for x, m in curve] + [(x, m["low"]) for x, m in reversed(curve)]
        path = lambda some: "M" + "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in some)
        out.append(f'<path d="{path(band)}Z" fill="{c}" opacity=".15"/><path d="{path([(x, m["mean"]) for x, m in curve])}" stroke="{c}" stroke-width="2.5" fill="none"/>'
                   + text(76, 28 + 18 * k, name, f'fill="{c}" font-weight="600"'))
    return "".join(out) + text(370, 386, xlabel, 'text-anchor="middle"') + text(16, 190, ylabel, 'text-anchor="middle" transform="rotate(-90 16 190)"') + "</svg>"


def write_table(path, header, rows):
    """A CSV file, written whole; None as an empty field."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write(path, buffer.getvalue())


def html_table(header, rows):
    show = lambda v: "&ndash;" if v is None else f"{v:.3f}" if isinstance(v, float) else html.escape(str(v))
    text = [bool(rows) and isinstance(rows[0][c], str) for c in range(len(header))]
    row = lambda tag, cells: "<tr>" + "".join(f"<{tag}{' class=text' * t}>{show(c)}</{tag}>" for c, t in zip(cells, text)) + "</tr>"
    return '<div class="wide"><table>' + row("th", header) + "".join(row("td", r) for r in rows) + "</table></div>"


def page(title, lead, sections):
    """One self-contained HTML page. lead: a sentence. sections: (heading, html)."""
    body = "".join(f"<section><h2>{html.escape(h)}</h2>{b}</section>" for h, b in sections)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>
:root{{--ink:#22302d;--dim:#71807b;--paper:#fbfaf6;--line:#dedbd0;--bar:#4f8f86;--mark:#22302d}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e6e8e3;--dim:#93a09b;--paper:#171c1b;--line:#343d3a;--bar:#4f9d92;--mark:#f2efe6}}}}
body{{overflow-wrap:anywhere;margin:0 auto;max-width:960px;padding:24px 18px 60px;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}}
h1{{margin:0;font-size:28px}}h2{{margin:40px 0 10px;font-size:19px}}p{{max-width:70ch}}small,.dim{{color:var(--dim);fill:var(--dim)}}
figure{{display:inline-block;vertical-align:top;width:150px;margin:0 10px 12px 0}}figure img{{width:100%;border-radius:6px;display:block}}
figcaption{{font-size:12px;line-height:1.35;color:var(--dim);margin-top:4px}}.wide{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:14px}}th,td{{padding:4px 14px 4px 0;text-align:right;vertical-align:bottom;border-bottom:1px solid var(--line)}}td{{white-space:nowrap}}
th:first-child,td:first-child,.text{{text-align:left}}svg{{width:100%;max-width:760px;font-size:12.5px;fill:var(--ink)}}rect{{fill:var(--bar)}}.small figure{{width:84px}}
.dot{{fill:var(--bar)}}.pale{{fill:none;stroke:var(--dim)}}.grid{{stroke:var(--line);fill:none}}.interval{{stroke:var(--mark);stroke-width:1.4;fill:none}}pre{{overflow-x:auto;font-size:12.5px}}
.bars{{display:grid;grid-template-columns:minmax(110px,max-content) 1fr max-content;gap:5px 12px;align-items:center;max-width:760px;font-size:13px;margin:6px 0 14px}}
.bars span:nth-child(3n+1){{text-align:right;overflow-wrap:anywhere}}.track{{position:relative;height:15px;background:linear-gradient(90deg,var(--line) 1px,transparent 1px) 0/20% 100%;border-right:1px solid var(--line)}}
.bars b{{display:block;height:100%;background:var(--bar);border-radius:2px}}.bars s{{position:absolute;top:3px;height:9px;border:solid var(--mark);border-width:0 1.4px;background:linear-gradient(var(--mark),var(--mark)) 0 50%/100% 1.4px no-repeat}}
h3{{margin:18px 0 4px;font-size:15px}}@media(max-width:520px){{figure{{width:calc(50% - 10px)}}.small figure{{width:calc(20% - 10px)}}.bars{{grid-template-columns:minmax(0,34%) 1fr max-content;gap:5px 8px;font-size:12px}}svg{{font-size:17px}}}}
</style><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}</html>"""


# ---------------------------------------------------------------------------------------------------------------------
# drawn scenes: a picture book of animals and places, every pixel a function of (kind, seed)

GENERATOR = 1  # counts up when the same seed draws other pixels
DRAWN_FIGURES, DRAWN_GROUNDS = 30, 40  # of each pre-training kind

def _rng(kind, seed):
    """Generator of its own for each (kind, seed); seed an int or a sequence of ints."""
    return np.random.default_rng([*(int(s) for s in np.atleast_1d(seed)), zlib.crc32(kind.encode())])

def _zoom(a, h, w, how=Image.BICUBIC):
    """2-d float32 array -> (h, w)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(a, np.float32)).resize((w, h), how))

def _noise(rng, h, w, cell=(4, 4), octaves=4, gain=.6):
    """Fractal value noise (h, w), about zero mean and unit deviation; cell = coarsest grid (rows, columns)."""
    a, (r, c) = 0., cell
    for k in range(octaves):
        a = (_zoom(a, r, c) if k else 0) + gain**k * rng.standard_normal((r, c), dtype=np.float32)
        if k < octaves - 1: r, c = min(2 * r, h), min(2 * c, w)
    return _zoom((a - a.mean()) / (a.std() + 1e-6), h, w)

def _rgb(code): return np.array([int(code[i:i + 2], 16) for i in (0, 2, 4)], np.float32)  # "rrggbb" -> (3,)
def _ramp(x, lo, hi): return np.clip((x - lo) / (hi - lo), 0, 1)
def _mix(a, b, t): return a + (b - a) * t
def _blend(a, b, t): return _mix(a, b, t[..., None])  # colours (3,) or (h, w, 3), t (h, w)
def _shade(colour, light): return colour * light[..., None]  # the same, light (h, w)

def _tint(rng, *codes, amount=1.):
    """One of the colours "rrggbb", varied a little in light and hue: (3,) float32."""
    c = _rgb(codes[rng.integers(len(codes))])
    return np.clip(c * np.exp(.10 * amount * rng.normal()) + 5 * amount * rng.normal(size=3), 4, 250).astype(np.float32)

def _table(text):
    """A header and rows of words -> (columns, {first word of the row: the other words})."""
    columns, *rows = (line.split() for line in text.strip().splitlines())
    return columns[1:], {name: words for name, *words in rows}

# --- foregrounds: curves, parts and the painter

def _curve(p, n, closed=False):
    """Catmull-Rom curve through p (k, d) -> (n, d)."""
    p = np.asarray(p, np.float32)
    q = np.concatenate([p[-1:], p, p[:2]] if closed else [2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(p) - (not closed), n, endpoint=not closed)
    i = np.minimum(t.astype(int), len(q) - 4)
    f, (a, b, c, d) = (t - i)[:, None], (q[i], q[i + 1], q[i + 2], q[i + 3])
    return b + .5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))

# shapes, at figure coordinates (body length ~ 1, y down): columns x, y of an outline, or x, y, radius of a tube
def _tube(*p, n=20): return _curve([(*np.ravel(a), b) for a, b in p], n)  # through (centre, radius)s
def _blob(*p, n=36): return _curve([np.ravel(a) for a in p], n, True)  # smooth closed outline
def _poly(*p): return np.array([np.ravel(a) for a in p], np.float32)  # outline with corners
def _dot(c, r): return np.array([[*c, r]], np.float32)
def _at(r, deg): return r * np.array([np.cos(np.radians(deg)), -np.sin(np.radians(deg))])  # polar -> (2,)

def _bricks(x, y, across, down, middle, squash):
    """Distance (h, w) to the middle of the brick, in a wall with so many bricks across and down."""
    v = down * y
    return np.hypot((across * x + .5 * (np.floor(v) % 2)) % 1 - .5, squash * (v % 1 - middle))

def _pattern(name, x, y, g):
    """Strength (h, w) in [0, 1] of a marking at figure coordinates x, y, wobbled by the grain g."""
    if name == "streak": return _ramp(np.sin(70 * y + 1.5 * g) * np.sin(21 * x + 4 * np.sin(23 * y) + g), .1, .5)
    if name == "bars": return _ramp(np.sin(58 * x + 14 * y + .6 * g), 0, .5)
    if name == "scallop": return _ramp(_bricks(x, y, 12, 15, 0, .8) + .06 * g, .45, .62)
    if name == "stripe": return _ramp(np.sin(34 * x + 3 * np.sin(5 * y) + .6 * g), -.1, .2)
    if name == "spot": return _ramp(-_bricks(x, y, 9, 9, .5, 1) + .03 * g, -.36, -.26)
    if name == "patch": return _ramp(g + np.sin(9 * x) + np.sin(8 * y + 2), .3, .5)
    if name == "scale": return _ramp(np.abs(np.sin(22 * (x + y)) * np.sin(22 * (x - y))), .3, .02)
    if name == "band": return _ramp(np.cos(21 * np.hypot(x, y) + .5 * g), .3, .8)

def _part(shapes, col, low=None, pat=None, patches=(), relief=1.):
    """A layer: union of shapes; colour col, fading to low beneath; pat = (name, colour, strength);
    patches = soft ellipses (centre, half-width, half-height, colour) inside the union."""
    return shapes if isinstance(shapes, list) else [shapes], col, low, pat, patches, relief

def _silhouette(shapes, w, h):
    """PIL mask of shapes in pixels; a tube is its discs joined by quadrilaterals."""
    mask = Image.new("L", (w, h))
    draw = ImageDraw.Draw(mask)
    for s in shapes:
        if s.shape[1] == 2:
            draw.polygon(s.ravel().tolist(), 255)
            continue
        for x, y, r in s.tolist(): draw.ellipse((x - r, y - r, x + r, y + r), 255)
        step = np.diff(s[:, :2], axis=0)
        normal = np.stack([-step[:, 1], step[:, 0]], 1) / (np.hypot(*step.T)[:, None] + 1e-6)
        ends = (s[:-1], 1), (s[1:], 1), (s[1:], -1), (s[:-1], -1)
        corners = np.concatenate([e[:, :2] + side * normal * e[:, 2:] for e, side in ends], 1)
        for c in corners.tolist(): draw.polygon(c, 255)
    return mask

def _colours(x, y, g, col, low, pat, patches):
    """Colours (h, w, 3) of a part at figure coordinates x (w,), y (h, 1), wobbled by the grain g (h, w)."""
    c = np.empty((*g.shape, 3), np.float32)
    c[:] = col
    if low is not None: c += _shade(low - c, _ramp(np.linspace(0, 1, len(y), dtype=np.float32)[:, None] + .05 * g, .45, .8))
    for (cx, cy), rx, ry, colour in patches:
        i = (slice(*np.searchsorted(y[:, 0], (cy - 1.25 * ry, cy + 1.25 * ry))),
             slice(*np.searchsorted(x, (cx - 1.25 * rx, cx + 1.25 * rx))))
        u, v = ((x[i[1]] - cx) / rx).astype(np.float32), ((y[i[0]] - cy) / ry).astype(np.float32)
        c[i] += _shade(colour.astype(np.float32) - c[i], _ramp(u**2 + v**2 + .12 * g[i], 1.15, .75))
    if pat is not None:
        t = (pat[2] * _pattern(pat[0], x, y, g))[..., None]
        c *= 1 - t
        c += t * pat[1].astype(np.float32)
    return c

def _light(mask, relief):
    """Brightness (h, w) of a round body of this silhouette, lit from above."""
    w, h = mask.size
    small = mask.resize((w // 4 + 2, h // 4 + 2), Image.BOX)
    small = np.asarray(small.filter(ImageFilter.GaussianBlur(min(w, h) / 28 + .5)), np.float32) / 255
    slope = relief * np.gradient(small, axis=0) * min(1, min(small.shape) / 14)
    return _zoom(.93 + .10 * small + 1.5 * slope, h, w, Image.BILINEAR)

def _render(parts, rng, size):
    """Paint parts in order on a doubled canvas -> PIL RGBA cropped to its alpha, long side = size."""
    edge = lambda side: np.concatenate([s[:, :2] + side * s[:, 2:].clip(0).sum(1, keepdims=True) for p in parts for s in p[0]])
    lo, hi = edge(-1).min(0), edge(1).max(0)
    k = float(2 * size / (hi - lo).max())  # pixels per unit
    W, H = (np.ceil((hi - lo) * k).astype(int) + 4).tolist()
    lo, canvas, grain = lo.astype(np.float32), Image.new("RGBA", (W, H)), _noise(rng, H, W, (10, 7), 4, .8)
    for shapes, col, low, pat, patches, relief in parts:
        px = [np.concatenate([(s[:, :2] - lo) * k + 2, s[:, 2:].clip(.004) * k], 1) for s in shapes]
        reach = [s[:, 2:].max(initial=0) for s in px]
        x0, y0 = np.clip(np.min([s[:, :2].min(0) - r for s, r in zip(px, reach)], 0).astype(int) - 1, 0, None)
        x1, y1 = np.minimum(np.max([s[:, :2].max(0) + r for s, r in zip(px, reach)], 0).astype(int) + 2, (W, H))
        mask = _silhouette([s - np.array([x0, y0, 0])[:s.shape[1]] for s in px], int(x1 - x0), int(y1 - y0))
        x = (np.arange(x0, x1, dtype=np.float32) - 2) / k + lo[0]
        y = (np.arange(y0, y1, dtype=np.float32)[:, None] - 2) / k + lo[1]
        g = grain[y0:y1, x0:x1]
        c = _shade(_colours(x, y, g, col, low, pat, patches), _light(mask, relief) + .05 * g)
        canvas.paste(Image.fromarray(c.clip(0, 255).astype(np.uint8)), (int(x0), int(y0)), mask)
    x0, y0, x1, y1 = box = canvas.getbbox()
    shrunk = [max(1, round(side * (size / max(x1 - x0, y1 - y0)))) for side in (x1 - x0, y1 - y0)]
    return canvas.resize(shrunk, Image.LANCZOS, box)

def _eye(c, r, iris="f4efe2"):
    """Parts of an eye: iris, pupil, glint."""
    return [_part(_dot(c, r), _rgb(iris)), _part(_dot(c + np.array([.12, .05]) * r, .68 * r), _rgb("15120f")),
            _part(_dot(c + np.array([.3, -.25]) * r, .2 * r), _rgb("ffffff"))]

# --- foregrounds: birds; body length 1, angles in degrees

_BIRD, _BIRDS = _table("""
kind       tilt deep neck aim bend thin head bill stout flat hook tail fan droop  leg wing crest
songbird     28  .33  .26  62    0  .22 .215  .17   .05    0    0  .42 .07    -8   .3  .62     0
finch        34  .35  .24  65    0  .24 .225  .15   .12   .1  .02   .4 .12   -10  .24  .58     0
woodpecker   62  .27   .3  62    0  .17 .185  .34  .055    0    0  .46 .05    -6   .2  .66   .16
owl          74  .36  .33  86    0  .31 .315  .12   .07    0  .06  .26 .12     0  .16  .66   .12
cardinal     34   .3  .28  60    0   .2   .2  .16    .1   .1  .02  .62 .08    -6  .28  .62   .26
dove         18   .3   .3  60    0  .15 .155  .13  .035    0  .02  .55  .1    -3  .18  .72     0
duck          8  .31  .46  66  .03  .12 .175   .3  .075    1    0  .26  .1    14  .16  .66     0
gull         10  .24  .36  58  .02  .13  .16  .23   .05   .1  .05  .34 .07     2  .26  .82     0
heron        24  .22 1.05  68  .16  .07   .1  .46  .045    0    0  .26 .09   -14  .78   .7   .26
cormorant    46  .23  .66  76  .12 .095 .125   .3   .04   .3  .06  .42 .08   -10  .16  .72     0
pelican      12  .33  .74  74  .17 .095  .15  .66   .06   .5  .02   .2  .1     6  .22  .78   .08
swan          6  .31    1  74  .22 .085 .135  .24  .065   .6  .03  .26 .09    22  .12  .74     0
toucan       50  .28  .28  62    0  .19   .2  .52   .14   .5  .06  .52 .07    -6  .16  .62     0
rooster      26  .34  .44  72  .03  .15  .15  .12   .06    0  .02  .56  .3   -62  .42  .56   .12
kiwi         16  .37  .34  22    0  .17  .15  .46  .035    0  .05  .02 .02     0   .3  .22     0
vulture      38  .31  .52  40  .14 .085 .115  .19   .07   .3  .09  .34  .1    -4  .34  .72     0
parrot       58  .27   .3  70    0  .21 .215  .19   .15   .2  .15  .95 .05    -4  .14  .66   .05
penguin      84  .31  .32  80    0  .19  .19  .22   .05    0  .04  .14  .1    30   .1  .58     0
ostrich      14  .34 1.15  78  .05 .055 .095  .17   .05   .4    0  .24  .2    26 1.05  .55   .03
""")
_INKS, _PLUMAGE = _table("""
kind         back  belly   head  crown breast   wing    tip   bill    leg    eye    mark strength
songbird   8a6f4d f1e8d3 8a6f4d 7b6244 dd6a2f 7d6344 4d3d2c 4a4038 7a4a38 15120f  streak      .35
finch      b5823a f0d9a4 c94f35 8d2f28 e0a13e 5d4a35 2f2822 d8b98a 8c5a40 15120f    bars      .45
woodpecker 2f2b2b efe3cb efe6d6 cf2f28 e9cfa5 34302f 1d1b1b 50483f 6b6258 cfc7b4    bars      .75
owl        8b6a45 e5d1a9 a98457 7a5936 d9bf92 76573a 4f3a27 3c352d c9a25c f2b632  streak       .7
cardinal   b5382f c8523f cf3a2c c22f26 c2402f 9a342c 6e2a26 e8925a 6a4a3a 15120f scallop       .3
dove       b89f8d e6cfc3 c9b0a4 b79c92 dfb1a6 a58f7b 5d5148 4a4340 c2605c 15120f scallop       .4
duck       b3b2b0 f0efec 1f6a4c 17543d 6e5148 9a9a9c 33406e e8b838 e07b2e 15120f scallop       .3
gull       a9b4bf fbfaf6 fbfaf6 f4f3ee fdfcf8 9fabb8 25272b ecb52f e9a25c f0e6b8       -        0
heron      8796a8 e4e6e8 f1f2f0 262c3a dfe3e6 7b8ca1 2f3846 e3a83c a8884c f3d34a       -        0
cormorant  1f2b2e 232f30 1c2527 182022 1f2a2b 33423f 161c1d d9a545 23272a 3fc0a0 scallop       .5
pelican    f3efe8 fbf8f2 fbf7ee f6ecd4 fdfaf4 ece6dc 2b2a2c f0a44a eb9148 15120f       -        0
swan       f4f2ee fcfbf9 fdfcfa f6f3ec ffffff efece6 dcd8d0 e87f33 33302f 15120f       -        0
toucan     22232a 2a2a30 22222a 1d1d24 f4e9c4 2a2b33 1c1c22 ee8f2c 6f8298 4f8fc0       -        0
rooster    b5582a 4a2f28 c9702f d8302a d8923a 7a3a26 1f4a44 e2b24a d8a23f 15120f   scale       .5
kiwi       7a5f45 97795a 86694d 7a5f45 8a6c50 75593f 6d523a d8c7a4 a88c6a 15120f   patch       .4
vulture    4a3f38 5d5048 d8a79a c98f84 d9d0c2 453a34 2f2824 d9cdb0 9a8f80 15120f   scale       .4
parrot     d2322d e0452f d63a30 c22a2a dd4030 e8b82f 2b62b8 2c2a2a 4a4543 f5f0d8       -        0
penguin    23272f f8f6f0 20242b 1b1f26 f6ce5a 2a2f38 20242b d8763a e08a3f 15120f       -        0
ostrich    2b2726 3b3532 d9b7a0 c8a48c 332e2c 332d2b f0ece4 c99a80 d3a78f 15120f       -        0
""")
_BIRDS = {kind: np.array(row, float) for kind, row in _BIRDS.items()}
_LAND, _WATER, _AFLOAT = [*_BIRDS][:6], [*_BIRDS][6:12], "duck gull pelican swan".split()

def _bird(rng, kind, d):
    """Side view, facing right; land- and waterbirds are caricatured for d < .5 and drawn to their common mean for d > .5."""
    both, owl, (*inks, mark, strength) = _LAND + _WATER, kind == "owl", _PLUMAGE[kind]
    pull, strength = .5 * (d - .5) * (kind in both), float(strength)
    common, pale = np.mean([_BIRDS[k] for k in both], 0), np.mean([[_rgb(c) for c in _PLUMAGE[k][:10]] for k in both], 0)
    shape = _mix(_BIRDS[kind], common, pull) * np.exp((.05 + .08 * d) * rng.normal(size=len(common)))
    tilt, deep, neck, aim, bend, thin, R, beak, stout, flat, hook, tail, fan, droop, leg, wing, crest = shape  # R: head
    c = {k: _mix(_tint(rng, i, amount=.6 + .8 * d), m, pull).clip(4, 252) for k, i, m in zip(_INKS, inks, pale)}
    tilt, aim = tilt + rng.normal() * 6, aim + rng.normal() * 9
    u, n = _at(1, tilt), _at(1, tilt + 90)
    P = lambda along, across: along * u + across * n  # a point of the body
    chest, rump, w = P(.30, .25 * deep), P(-.46, .02), _at(neck, aim)
    head, side = chest + w, np.array([-w[1], w[0]]) * bend / max(neck, .1) * 1.6
    out = []
    for far in (1, 0):  # the far leg first; some birds swim
        hip = P(-.06 - .34 * u[1]**2, (-.75 - .4 * u[1]) * deep) + [.09 * far - .02, 0]
        if kind in _AFLOAT and leg < rng.uniform(.10, .30): continue
        foot = hip + [.02 + .05 * rng.normal() * leg, leg + .1 + .1 * deep]
        limb = [_tube((hip, .05), (hip + [-.04, .5 * (leg + .1)], .020), (foot, .017), n=10)]
        limb += [_tube((foot, .018), (foot + [x, .03], .010), n=4) for x in (.14, .09, -.07)]
        if kind in (*_AFLOAT, "cormorant", "penguin"):  # a web
            limb.append(_poly(foot - [.02, .02], foot + [.16, .035], foot + [-.04, .035]))
        out.append(_part(limb, c["leg"] * (.75 if far else 1)))
    for s in (90 * fan * np.array([-1, .9, -.4, .3, 0])).tolist():
        back = tilt + 180 + droop
        mid, tip = rump + _at(.6 * tail, back + s), rump + _at(tail * (1 - .015 * abs(s)), back + 1.4 * s)
        out.append(_part(_tube((rump, .05), (mid, .045 + .25 * fan), (tip, .03 + .1 * fan), n=8), c["tip"] * (1 + .02 * s) * .95))
    for s in (0, -16) if crest > .04 and not owl else ():
        mid, tip = head + _at(R + .6 * crest, 150 + s), head + _at(R + crest, 165 + s)
        out.append(_part(_tube((head + _at(.5 * R, 120), .4 * R), (mid, .2 * R), (tip, .01), n=8), c["crown"]))
    face, down = _at(1, rng.normal() * 8 - 4 - 5 * hook), np.array([0, 1])
    if kind == "pelican":
        pouch = _blob(head, head + face * (R + .5 * beak) + [0, .13], head + face * (R + beak * .95), head + [0, .5 * R])
        out.append(_part(pouch, c["bill"] * .93))
    flank = (P(-.25, .02), .80 * deep), (P(0, 0), deep), (P(.2, .02), .9 * deep)
    trunk = _tube((rump, .35 * deep), *flank, (chest, .6 * deep), n=22)
    throat = _tube((P(.12, 0), .7 * deep), (chest + .08 * w, _mix(.55 * deep, thin, .5)), (chest + .38 * w + side, 1.15 * thin),
                   (chest + .72 * w - .55 * side, thin), (head, R), n=22)
    patches = [(P(.02, -.62 * deep), .50, .62 * deep + .12 * abs(u[1]), c["belly"]),
               (_mix(chest, head, .35) + [.06, .12], .22, .22 + .2 * neck, c["breast"]),
               (head + _at(.06, 250), 1.4 * R, 1.25 * R + .25 * (neck - .2), c["head"]),
               (head + _at(.75 * R, 105), .95 * R, .5 * R, c["crown"])]
    streaks, bars = (mark, c["tip"], .5 * strength), (mark, c["belly"], .6 * strength)
    out.append(_part([trunk, throat], c["back"], None, streaks if mark == "streak" else None, patches))
    lift = rng.random() < .18 and not owl  # the wing: flight feathers, then coverts
    S, angle, span = P(.20, .12 * deep), tilt + (rng.uniform(95, 135) if lift else 178), wing * (1.15 if lift else 1)
    for i in range(7):
        a = angle + (9 if lift else 3.2) * (i - 3) + 4
        tip = S + _at(span * (1 - .05 * (6 - i)), a - 2)
        feather = _tube((S, .2 * deep), (S + _at(.55 * span, a), .27 * deep), (tip, .05 * deep), n=9)
        out.append(_part(feather, c["tip"] * (.88 + .07 * (i % 3)), None, bars if mark == "bars" else None))
    coverts = _tube((S, .42 * deep), (S + _at(.28 * span, angle), .52 * deep), (S + _at(.62 * span, angle + 1), .2 * deep), n=12)
    marking = (mark, _mix(c["tip"], c["belly"], .55 * (mark == "bars")), strength)
    out.append(_part(coverts, c["wing"], None, marking if mark != "-" else None))
    if owl:  # tufts, two eyes in a facial disc, the beak between them
        for s in (42, -42):
            tuft = _tube((head + _at(.7 * R, 90 + s), .2 * R), (head + _at(R + crest, 90 + 1.1 * s), .02), n=6)
            out.append(_part(tuft, c["crown"]))
        out += [_part(_dot(head + [s * .43 * R, -.02], .47 * R), _mix(c["belly"], c["head"], .15)) for s in (-1, 1)]
        out += [p for s in (-1, 1) for p in _eye(head + [s * .4 * R, -.03], .26 * R, "f2b632")]
        return out + [_part(_tube((head + [0, .1 * R], .12 * R), (head + [0, .5 * R], .01), n=6), c["bill"])]
    root = head + face * .7 * R + .12 * R * down
    for r, drop, light in ((.62 * stout, .45 * stout, .8), (.75 * stout, -.15 * stout, 1)):  # the halves of the bill
        a, tip = root + drop * down, root + drop * .3 * down + face * (.3 * R + beak) + hook * down
        half = _tube((a, r), (a + face * (.3 * R + .55 * beak), r * (.62 + .25 * flat)), (tip, r * (.08 + .72 * flat)), n=10)
        out.append(_part(half, c["bill"] * light))
    return out + _eye(head + face * .3 * R + [0, -.18 * R], max(.17 * R, .022), "f4efe2" if c["eye"].sum() > 150 else "2b2320")

# --- foregrounds: four-legged animals and a cabinet of others

_BEAST, _BEASTS = _table("""
kind     deep neck aim thin head snout  jaw ear earw leg legw tail tailw rise   coat  under   sock   trim   mark    ink strength
fox       .19   .2  40  .14  .15   .24 .045  .2  .08 .36 .045  .62   .13  205 d0672b f3e6d2 4a3028 d0672b      -      -        -
deer      .21  .42  58   .1 .115    .2  .06 .18  .06 .62 .045  .12   .05  215 a8703f ead9bb 94613a b58254   spot f2e3c4       .5
elephant  .36  .12  30  .24  .25    .2  .09  .3  .24  .4  .11  .34   .02  250 8d8f98 a3a4aa 83858e 84858f      -      -        -
zebra     .24  .38  52  .14  .13   .26 .075 .13  .05  .5  .05  .36  .025  245 f4f1ea f4f1ea eceae4 2a2727 stripe 262424      .95
bear      .32  .14  20  .22   .2   .17  .08 .09  .08 .32   .1  .06   .05  180 6a4a35 7d5c44 553a2a 6a4a35      -      -        -
rabbit    .27  .14  40  .16  .18    .1  .08 .42  .06 .16  .06   .1    .1  160 a99a8a f3efe8 a09080 b8a596      -      -        -
leopard    .2  .18  35  .15  .15   .13 .075 .09  .06 .36  .06  .66  .035  215 dca94f f4e8cc d6a34e c99645   spot 3a2a1e      .85
sheep     .34   .1  25  .18  .13   .17  .06 .13  .05 .26 .045   .1   .06  210 efe8da e4dccd 4b4440 4b4440      -      -        -
""")

def _beast(rng, kind, d):
    """Side view of a quadruped, facing right."""
    row, elephant, sheep = _BEASTS[kind], kind == "elephant", kind == "sheep"
    shape = np.array(row[:14], float) * np.exp(.08 * rng.normal(size=14))
    deep, neck, aim, thin, R, snout, jaw, ear, earw, leg, legw, tail, tailw, rise = shape  # R: the head
    (coat, under, sock, trim), (mark, ink, strength) = (_tint(rng, ink) for ink in row[14:18]), row[18:]
    base, rump = np.array([.36, -.35 * deep]), np.array([-.5, -.3 * deep])
    head = base + _at(neck + .08, aim + 8 * rng.normal())
    face = _at(1, -22 - 8 * rng.normal())
    long_ear = lambda s: _blob(head + _at(.6 * R, 110 + s), head + _at(R + .5 * ear, 118 + s) - [earw, 0],
                               head + _at(R + ear, 115 + s), head + _at(R + .5 * ear, 112 + s) + [earw * .6, 0], n=20)
    out, near = [], []
    for far, x, bend in ((1, -.38, -.05), (1, .36, .03), (0, -.38, -.05), (0, .36, .03)):
        hip, s, long = np.array([x + .07 * far, .2 * deep]), .10 * rng.normal() * leg, leg + .8 * deep
        limb = _tube((hip, 1.9 * legw), (hip + [s + bend, .5 * long], legw), (hip + [1.4 * s, .92 * long], .8 * legw),
                     (hip + [1.4 * s + .03, long], .9 * legw), n=14)
        if far: out.append(_part(limb, sock * .72))
        else: near.append(limb)
    mid, tip = rump + _at(.5 * tail, rise - 15), rump + _at(tail, rise + 15 * rng.normal())
    out.append(_part(_tube((rump, tailw * .6), (mid, tailw), (tip, .3 * tailw), n=12), trim))
    if not elephant: out.append(_part(long_ear(-25), trim * .8))
    for s in (20, -8) if kind == "deer" and rng.random() < .7 else ():
        mid, tip = head + _at(R + .22, 115 + s), head + _at(R + .42, 95 + s)
        antler = [_tube((head + _at(R, 100), .022), (mid, .018), (tip, .008), n=8),
                  _tube((head + _at(R + .2, 113 + s), .016), (head + _at(R + .3, 85 + s), .006), n=4)]
        out.append(_part(antler, _rgb("7c5b3c") * (1 - .01 * s)))
    if elephant:
        tip = head + [.40 + .1 * rng.normal(), .66]
        near.append(_tube((head + face * R, .11), (head + [.30, .30], .08), (head + [.30, .55], .05), (tip, .035), n=16))
    lip = head + face * (R * .6 + snout)
    muzzle = _tube((head, R), (head + face * (R * .8 + .4 * snout), _mix(R, jaw, .65)), (lip, jaw), n=12)
    haunch = (rump + [.06, .2 * deep], .72 * deep), ((-.22, .02), .93 * deep)
    body = [_tube(*haunch, ((.1, .04), .93 * deep), ((.32, 0), deep), n=16), muzzle, *near,
            _tube(((.28, 0), .8 * deep), (_mix(base, head, .4), 1.2 * thin), (head, .95 * thin), n=10)]
    if sheep:  # fleece
        body = [_dot((x, y), .13 + .05 * rng.random()) for x in np.linspace(-.48, .36, 6) for y in (-.2, .0, .18)]
        out.append(_part(near, sock))
    patches = [((x, .75 * deep + .2 + leg * .8), .2, .22, sock) for x in (-.4, .38)]
    patches.append(((0, 1.0 * deep), .42, .45 * deep, under))
    if kind in ("fox", "deer"): patches.append((head + face * (R + .3 * snout) + [0, .08], .2, .1, under))
    out.append(_part(body, coat, None, (mark, _rgb(ink), float(strength)) if mark != "-" else None, patches))
    if sheep: out.append(_part(muzzle, sock))
    if kind == "zebra":
        mid = _mix(base, head, .5) + _at(thin * 1.3, 150)
        out.append(_part(_tube((head + _at(R, 80), .03), (mid, .05), (base + _at(.2, 150), .03), n=8), trim))
    flap = [head + p for p in ([-.02, -.24], [-.36, -.24], [-.44, .10], [-.24, .36], [-.02, .14])]
    out.append(_part(_blob(*flap) if elephant else long_ear(8), trim))
    out += _eye(head + face * .45 * R + [0, -.3 * R], .15 * R + .012, "2b2320")
    nose = _dot(head + face * (.62 * R + 1.25 * snout) - [0, .3 * jaw], .42 * jaw + .008)
    return out if elephant else out + [_part(nose, _rgb("2b2220"))]

_OTHERS = "fish butterfly turtle mushroom car".split()

def _other(rng, kind, d):
    """Things without a common plan: fish, butterfly, turtle, mushroom, car."""
    a = _tint(rng, "d9782d", "c23b3b", "3f7fb5", "8a4fa0", "3f8f5a", "d8b13a", amount=1.6)
    b = _tint(rng, "f2d9a0", "efe6da", "2d2a33", "6fb7b0", "e3a0a8", amount=1.6)
    j, dark, both = rng.uniform(-1, 1, 6), _rgb("2a2422"), (-1, 1)
    if kind == "fish":
        h, fin, marking = .30 + .10 * j[0], _mix(a, b, .6), ("scale", dark, .35) if j[4] < 0 else ("stripe", b, .8)
        tail = _blob((-.48, 0), (-.85, -.30 - .1 * j[1]), (-.72, 0), (-.85, .30 + .1 * j[2]))
        fins = [_blob((.25, -.8 * h), (-.05, -1.6 * h - .1 * j[3]), (-.40, -.9 * h), (-.3, -.2)),
                _blob((.05, .7 * h), (-.15, 1.5 * h), (-.3, .5 * h))]
        body = _blob((.62, .03), (.30, -.75 * h), (-.05, -h), (-.50, -.07), (-.50, .08), (-.05, h), (.32, .75 * h))
        return [_part(tail, fin, None, ("stripe", dark, .2)), _part(fins, fin),
                _part(body, a, b, marking, [((.52, 0), .22, .3, _mix(a, b, .3))]),
                _part(_blob((.12, .04), (-.16, .0), (-.2, .16), (-.02, .15)), fin * .9), *_eye(np.array([.40, -.08]), .055)]
    if kind == "butterfly":
        wide, bottom, top = .50 + .1 * j[0], .55 + .1 * j[1], -.58 - .1 * j[2]
        low = [_blob((s * .02, .05), (s * .35, .10), (s * wide, .42), (s * .22, bottom), n=30) for s in both]
        high = [_blob((s * .02, 0), (s * .20, -.42), (s * .70, top), (s * .72, -.15), (s * .35, .12), n=30) for s in both]
        rod = [_tube(((0, -.25), .015), ((s * .08, -.45), .008), ((s * .2, -.62), .012), n=8) for s in both]
        rod.append(_tube(((0, -.28), .05), ((0, -.1), .06), ((0, .1), .045), ((0, .42), .02)))
        eyed = [_part(p, a, None, ("band", dark, .75), [((s * .48, -.3), .13, .13, b)]) for p, s in zip(high, both)]
        return [_part(p, _mix(a, b, .25), None, ("spot", b, .7)) for p in low] + eyed + [_part(p, dark) for p in rod]
    if kind == "turtle":
        skin = _tint(rng, "6f8f4a", "8a8450", "4f7f66", amount=1.6)
        shell = _tint(rng, "6b4a2c", "4f5a2f", "7a5f38", amount=1.6)
        legs = [_tube(((x, .12), .10), ((x + .05 * j[i], .34), .075), n=6) for i, x in enumerate((-.36, -.22, .26, .42))]
        neck = _tube(((.3, .1), .10), ((.62, -.02 - .1 * j[4]), .085), ((.78, -.1 - .12 * j[4]), .12), n=10)
        dome = _blob((-.62, .2), (-.45, -.2), (0, -.46 - .06 * j[5]), (.42, -.2), (.58, .2), (0, .26))
        return [_part(p, skin * (.8 + .1 * (i % 2))) for i, p in enumerate(legs)] + [
            _part(neck, skin, None, ("patch", b, .3)), _part(_tube(((-.5, .12), .05), ((-.72, .2), .01), n=4), skin),
            _part(dome, shell, None, ("scale", _mix(shell, _rgb("f0d890"), .6), .8), relief=1.3),
            *_eye(np.array([.81, -.14 - .12 * j[4]]), .026)]
    if kind == "mushroom":
        stem = _blob((-.12, -.1), (-.16 - .04 * j[0], .5), (.16 + .04 * j[1], .5), (.12, -.1))
        left, right = (-.42 - .05 * j[2], -.34), (.42 + .05 * j[4], -.34)
        cap = _blob((-.58, .02), left, (0, -.60 - .15 * j[3]), right, (.58, .02), (0, .06))
        gills = _blob((-.5, .03), (0, -.06), (.5, .03), (0, .12))
        return [_part(stem, _rgb("efe4cf"), _rgb("c9b899")), _part(gills, _rgb("d8c7a6")),
                _part(cap, a, None, ("spot", _rgb("f7f0e0"), .9), relief=1.4)]
    roof, glass, wheel = -.36 - .05 * j[0], _rgb("bfd6dd"), ((.19, dark), (.10, _rgb("b9b6ae")), (.04, dark))
    hull = _blob((-.88, .0), (-.5, -.06), (.45, -.05), (.88, .05), (.92, .26), (.0, .30), (-.92, .26))
    lamps = [((.84, .1), .06, .06, _rgb("f6e7a0")), ((-.88, .1), .05, .06, _rgb("a82a22"))]
    return [_part(_blob((-.52, .02), (-.36, roof), (.22, roof), (.46, .02)), a * .92),
            _part(_poly((-.40, 0), (-.30, -.28), (-.06, -.30), (-.06, 0)), glass),
            _part(_poly((-.01, 0), (-.01, -.30), (.18, -.28), (.34, 0)), glass), _part(hull, a, a * .7, None, lamps),
            *(_part(_dot((x, .28), r), c) for x in (-.52, .52) for r, c in wheel)]

FOREGROUNDS = {"landbird": _LAND, "waterbird": _WATER, "pretrain": [*_BIRDS][12:] + [*_BEASTS] + _OTHERS}

def draw_foreground(kind, seed, size=160, difficulty=.5):
    """PIL RGBA figure cropped to its alpha, long side = size; difficulty in [0, 1]: how alike the two bird classes are."""
    rng = _rng(kind, seed)
    return _render((_bird if kind in _BIRDS else _beast if kind in _BEASTS else _other)(rng, kind, difficulty), rng, size)

# --- backgrounds: a painter takes (rng, n) and returns (n, n, 3) in 0..255; x, y in [0, 1), y down, hz = height of the horizon

_DAYS = ("4f93d6 d9ebf5 fff7e0", "7fb2e0 f6efe0 fff3cf", "9fb3c4 dfe3e4 f2f2ee",  # zenith, horizon, sun
         "5a6fa8 f3b58a ffd9a0", "86a8c8 f8d8b8 fff0c8", "6c8ea6 c9d6d6 eef2ee")

def _grid(n): return np.mgrid[0:n, 0:n].astype(np.float32) / n  # y, x, each (n, n)
def _ridge(rng, n, cells=4): return _noise(rng, 4, n, (2, cells), 5, .5)[1]  # skyline (n,)
def _creases(rng, n, cell=(3, 3)): return 1 - np.abs(_noise(rng, n, n, cell, 5, .5))  # (n, n), sharp at 1

def _lay(img, mask, colour):
    """Paint colour (3,) or (n, n, 3) through mask (n, n), in place."""
    rows = np.flatnonzero(mask.any(1))
    r = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0)
    colour, part = np.asarray(colour, np.float32), img[r]
    part += mask[r, :, None].astype(np.float32) * ((colour[r] if colour.ndim == 3 else colour) - part)

def _stencil(n, polygons=(), ellipses=(), lines=()):
    """Antialiased mask (n, n) in [0, 1] of polygons x, y, x, y...; boxes of ellipses; lines (width, (x, y, x, y...))."""
    mask = Image.new("L", (2 * n, 2 * n))
    draw, pixels = ImageDraw.Draw(mask), lambda p: (np.ravel(p) * (2 * n)).tolist()
    for p in polygons: draw.polygon(pixels(p), 255)
    for p in ellipses: draw.ellipse(pixels(p), 255)
    for width, p in lines: draw.line(pixels(p), 255, int(width * (2 * n)), "curve")
    return np.asarray(mask.reduce(2), np.float32) / 255

def _sky(rng, n, lowest, highest, days=_DAYS, clouds=.6):
    """Sky with sun and clouds -> image, horizon in [lowest, highest], colours of zenith, horizon and sun, x, y."""
    hz = rng.uniform(lowest, highest)
    (top, low, sun), (y, x) = (_tint(rng, c, amount=.5) for c in days[rng.integers(len(days))].split()), _grid(n)
    img = _blend(top, low, _ramp(y, 0, hz)**1.3)
    if rng.random() < .6:
        distance = (x - rng.uniform(.1, .9))**2 + (y - hz * rng.uniform(.1, .9))**2
        _lay(img, .9 * np.exp(-distance / rng.uniform(.002, .03)), sun)
    cover = _ramp(_noise(rng, n, n, (6, 3), 5), rng.uniform(-.2, 1.2), 2.2)
    _lay(img, cover * clouds * _ramp(y, hz + .1, hz - .3), _mix(low, sun, .8))
    return img, hz, top, low, sun, x, y

def _ground(rng, n, a, b, y, hz, stretch=3):
    """Ground colour (n, n, 3) between a and b: noise, finer and paler towards the horizon."""
    t = _noise(rng, n, n, (6 * stretch, 6), 4, .8) * .3 + .5 + .35 * _ramp(y, hz, 1) - .2
    return _blend(a, b, t.clip(0, 1))

def _blades(rng, n, count, y0, y1, size, lean):
    """Mask of grass, fern or reed blades rooted between heights y0 and y1."""
    x, y = rng.uniform(-.03, 1.03, count), np.sort(rng.uniform(y0, y1, count))
    h = size * rng.uniform(.5, 1.2, count) * (.4 + .6 * _ramp(y, y0 - .05, 1))
    dx, w = h * lean * rng.normal(size=count), .05 * h
    return _stencil(n, np.stack([x - w, y, x + dx * .4, y - .6 * h, x + dx, y - h, x + dx * .4 + w, y - .55 * h, x + w, y], 1))

def _poles(n, x, w, lean, taper):
    """Mask of trunks from the bottom to the top edge; x, half width w and lean: (k,)."""
    bottom, top, tip = np.ones(len(x)), np.zeros(len(x)), x + lean
    return _stencil(n, np.stack([x - w, bottom, tip - taper * w, top, tip + taper * w, top, x + w, bottom], 1))

def _waves(rng, n, y, hz, k=1.):
    """Ripple field (n, n) about zero: crests shrink towards the horizon."""
    d, chop = 1 / (_ramp(y, hz - .02, 1) + .06), _noise(rng, n, n, (60, 8), 3, .7)
    return chop * .7 + np.sin(k * 26 * np.log(d + .3) + 2.2 * _noise(rng, n, n, (5, 4), 3)) * .7

def _forest(rng, n):
    """Trunks and leaves in four layers, the far one first, over moss and ferns, crossed by rays of light."""
    woods = ("e6ecbf 4f7f38 4a3828 5c7a36", "f3dfae b8702c 4b382c 8a6a34",
             "c4d8cf 2f5a44 2f3330 3d5a3a", "d6e3a4 6a9440 5b4a36 7a8a3c")
    (glow, leaf, bark, moss), (y, x) = (_tint(rng, c) for c in woods[rng.integers(4)].split()), _grid(n)
    hz = rng.uniform(.62, .82)
    img = _blend(_mix(leaf, glow, .55), glow, np.exp(-((y - .45)**2 / .05 + (x - rng.random())**2 / .12)))
    for z in (.25, .5, .75, 1.):
        trunk, clump = _mix(_mix(glow, leaf, .4), bark * .9, z), _noise(rng, n, n, (5, 5), 5, .7)
        w = rng.uniform(.012, .045, rng.integers(4, 9)) * z * 1.7
        poles = _poles(n, rng.uniform(0, 1, len(w)), w, .04 * rng.normal(size=len(w)), .7)
        _lay(img, poles, _shade(trunk, (.85 + .25 * _noise(rng, n, n, (4, 40), 2)).clip(.5, 1.4)))
        leaves = _shade(_mix(glow, leaf * (1.15 - .55 * z), .45 + .5 * z), 1 + .16 * clump[::-1])
        _lay(img, _ramp(clump + 3.4 * (.42 - .30 * z - y), .0, .35) * .9, leaves)
    floor, slant = _ramp(y - hz - .02 * _ridge(rng, n), -.03, .05), x + .5 * y
    _lay(img, floor, _ground(rng, n, moss * .55, _mix(moss, glow, .35), y, hz))
    rays = _ramp(np.sin(14 * slant + 6 * rng.random()) * np.sin(5 * slant + 6 * rng.random()), .2, 1)
    _lay(img, .28 * rays * _ramp(y, 1, .2), glow)
    _lay(img, _blades(rng, n, 90, hz, 1.05, .16, .7), moss * rng.uniform(.5, .8))
    _lay(img, _blades(rng, n, 60, hz + .1, 1.1, .17, .8), _mix(moss, glow, .2))
    return img

def _bamboo(rng, n):
    """Canes and leaves in three layers, the far one first."""
    glow, cane, (y, x) = _tint(rng, "e2edb4"), _tint(rng, "8fae4a", "a9a648", "6f9a52"), _grid(n)
    img = _blend(glow, cane * .6, _ramp(np.abs(y - rng.uniform(.3, .6)), 0, .8) + .12 * _noise(rng, n, n, (5, 9), 3))
    for z in (.3, .6, 1.):
        xs, node = rng.uniform(0, 1, rng.integers(6, 12)), rng.uniform(.10, .2)
        w, lean = (.011 + .018 * z) * rng.uniform(.6, 1.2, len(xs)), .05 * rng.normal(size=len(xs))
        light = .92 + .12 * np.sin(x * 160) - .35 * _ramp(np.cos((y + .13 * np.floor(x * 9)) * 6.28 / node), .93, 1)
        _lay(img, _poles(n, xs, w, lean, 1), _shade(_mix(glow, cane * (1.1 - .45 * z), .3 + .7 * z), light))
        root = np.stack([rng.uniform(0, 1, 70), rng.uniform(0, .75, 70) * rng.random(70)**.5], 1)
        long, turn = rng.uniform(.05, .11, 70) * (.5 + .7 * z), rng.uniform(-.9, 2.2, 70)
        along = np.stack([long * np.cos(turn), long * np.sin(turn)], 1)
        across = .12 * along[:, ::-1] * [-1, 1]
        leaves = _stencil(n, np.stack([root, root + .5 * along + across, root + along, root + .5 * along - across], 1))
        _lay(img, leaves, _mix(glow, cane * .8, .35 + .6 * z))
    _lay(img, _ramp(y - .86 - .03 * _ridge(rng, n), -.02, .06), _ground(rng, n, cane * .4, _rgb("a58f5a"), y, .8))
    return img

def _meadow(rng, n):
    """Three hills, the far one first and with trees on the far two, then grass with flowers."""
    img, hz, top, low, sun, x, y = _sky(rng, n, .28, .5)
    grass = _tint(rng, "7da33f", "97a548", "5f9447", "b3a552")
    bloom = _tint(rng, "e05a4a", "f2d14a", "c06fc0", "f5f2ea", "e98ab0")
    for z in (0, .5, 1):
        up, light = hz - .06 + .07 * z - (.06 - .03 * z) * _ridge(rng, n, 3), 1 + .10 * _noise(rng, n, n, (14, 24), 3)
        _lay(img, _ramp(y - up, 0, .008), _shade(_mix(_mix(grass * .8, low, .55 - .4 * z), grass, z), light))
        if z < 1:
            a, r = rng.random(34)**.8, rng.uniform(.008, .02 + .03 * z, 34) * (rng.random(34) < .7)
            b = up[(a * n).astype(int)]
            trees = _stencil(n, ellipses=np.stack([a - r, b - 1.3 * r, a + r, b + .9 * r], 1))
            _lay(img, trees, _shade(_mix(grass * .45, low, .35 - .3 * z), light))
    _lay(img, _ramp(y, hz, hz + .06), _ground(rng, n, grass * .62, _mix(grass, _rgb("f0e08a"), .35), y, hz, 2))
    for s in (.55, 1.15, .8): _lay(img, _blades(rng, n, 130, hz + .10, 1.1, .13, .3), grass * s)
    a, b = rng.random(90), hz + .06 + (1 - hz) * rng.random(90)
    r = .004 + .016 * _ramp(b, hz, 1)
    _lay(img, _stencil(n, ellipses=np.stack([a - r, b - .8 * r, a + r, b + .8 * r], 1)), bloom)
    return img

def _sea(rng, n):
    """Open water with glitter and foam, sometimes land beyond."""
    img, hz, top, low, sun, x, y = _sky(rng, n, .22, .55)
    deep, w = _mix(_tint(rng, "2a6a8c", "2f7f86", "3a5f80", "4a7c94"), top, .25), _waves(rng, n, y, hz)
    water = _shade(_blend(_mix(low, deep, .55), deep * .8, _ramp(y, hz, 1)), 1 + .17 * w)
    glitter = np.exp(-((x - rng.random()) / (.05 + .25 * (y - hz).clip(0)))**2)
    _lay(water, .75 * glitter * _ramp(w, .2, 1.2), sun)
    _lay(water, _ramp(w * (.5 + y), 1.15, 1.6) * .85, _rgb("f6faf8"))
    _lay(img, _ramp(y, hz, hz + .006), water)
    if rng.random() < .4:
        land = _ramp(y - hz + .015 + .05 * _ramp(_ridge(rng, n, 4), .2, 2), 0, .006) * (y < hz + .004)
        _lay(img, land, _mix(deep, low, .5) * .8)
    return img

def _lake(rng, n):
    """Three shores, the far one first, mirrored in still water, often behind reeds."""
    img, hz, top, low, sun, x, y = _sky(rng, n, .3, .52)
    tone = _tint(rng, "4f6f4a", "5a6a72", "6f6a48")
    for z in (.25, .6, 1.):
        up = hz - .02 - (.14 - .10 * z) * (1 + .6 * _ridge(rng, n, 3 + int(6 * z))).clip(.1)
        light = 1 + .10 * z * _noise(rng, n, n, (30, 30), 2)
        _lay(img, _ramp(y - up, 0, .01), _shade(_mix(low, tone * .75, z * .85), light))
    w = _waves(rng, n, y, hz, 1.6)
    rows = np.clip(2 * hz * n - np.arange(n)[:, None] + 5 * w * _ramp(y, hz, hz + .2), 0, n - 1).astype(int)
    water = _blend(img[rows, np.arange(n)], _mix(top, _tint(rng, "3f6f80"), .6), _ramp(y, hz - .3, 1.1))
    water = _shade(water, .93 + .07 * w)
    _lay(water, .5 * _ramp(w, .9, 1.6), low)
    _lay(img, y > hz, water)
    if rng.random() < .7:
        reeds = _blades(rng, n, 60, 1., 1.15, rng.uniform(.25, .5), .15)
        _lay(img, reeds * _ramp(np.abs(x - rng.uniform(.3, .7)), .2, .3), tone * .6)
    return img

def _surf(rng, n):
    """Five breakers of foam with their shadows, sometimes a beach, up to three rocks."""
    img, hz, top, low, sun, x, y = _sky(rng, n, .04, .25)
    deep, sand = _mix(_tint(rng, "2f8a96", "3a7f9c", "4a8f8a"), top, .2), _tint(rng, "cdb68c")
    water = _blend(deep * .85, _mix(deep, _rgb("c5ecdf"), .5), _ramp(y, hz, .95))
    _lay(img, _ramp(y, hz, hz + .006), _shade(water, 1 + .10 * _waves(rng, n, y, hz, 1.2)))
    lace = _noise(rng, n, n, (34, 22), 3, .8)
    for c in (np.linspace(hz + .10, .95, 5) + .03 * rng.normal(size=5)).tolist():
        e, lace = y - c - .03 * _ridge(rng, n, 3), lace[:, ::-1]
        foam = _ramp(.4 * lace + 1.1 - np.where(e > 0, 60 / (.3 + c), 11 / (.2 + c)) * np.abs(e), 0, .6)
        _lay(img, foam, _shade(_rgb("f7fbfa"), .95 + .05 * lace))
        _lay(img, .35 * np.exp(-((e - .04) / .02)**2), deep * .5)
    if rng.random() < .5:
        beach = _ramp(y - rng.uniform(.86, .97) - .03 * _ridge(rng, n, 3), 0, .02)
        _lay(img, beach, _ground(rng, n, sand * .75, sand, y, .8))
    for a in rng.random(rng.integers(0, 4)).tolist():
        r, b, g = rng.uniform(.04, .10), rng.uniform(hz + .15, .9), _noise(rng, n, n, (12, 12), 3)
        rock = _ramp(1 - ((x - a) / r)**2 - ((y - b) / (.6 * r))**2 + .25 * g, 0, .1) * _ramp(b + .45 * r - y, 0, .01)
        _lay(img, rock, _shade(_rgb("5a5550"), (1 - .3 * g - 3 * (y - b)).clip(.4, 1.5)))
    return img

# ---- places for pre-training only: ridged, striped and warped textures instead of the ones above

_SOILS = {"desert": ["d9a45c"] * 3, "mountain": ["6f7f68"] * 3, "snow": ["e9eef4"] * 3, "savanna": ["b58a3c"] * 3,
          "rows": ["6f8f3c", "c2a83c", "8a6fb0"]}  # three each, as every kind takes the same draws

def _plant(rng, n, kind, a, b, s, low):
    """Mask and colour of what grows at (a, b), height about s: a cactus, an acacia or a fir."""
    if kind == "desert":
        arms = [(a, b - h * s, a + w * s, b - h * s, a + w * s, b - 2 * h * s) for w, h in ((.3, .4), (-.3, .3))]
        return _stencil(n, lines=[(.13 * s, p) for p in ((a, b, a, b - s), *arms)]), _tint(rng, "5a7a44")
    if kind == "savanna":
        places = (-.2 * s, 1.05), (.25 * s, 1.15), (0, 1.25)
        crowns = [(a + x - .5 * s, b - h * s, a + x + .5 * s, b - h * s + .25 * s) for x, h in places]
        return _stencil(n, ellipses=crowns, lines=[(.06 * s + .5 / n, (a, b, a, b - s))]), _rgb("3f3220")
    tiers = [(a - w * s, b - h * s, a, b - (h + .55) * s, a + w * s, b - h * s) for w, h in ((.30, 0), (.24, .3), (.16, .6))]
    return _stencil(n, tiers), _mix(_tint(rng, "35524a"), low, .2)

def _vista(rng, n, kind):
    """Open land under the sky, with three ranges behind: desert, mountain, snow, savanna, rows."""
    days = ("d9743a f6c66a ffe9a8", "7a4a7a f09a5a ffd890") if kind == "savanna" else _DAYS
    img, hz, top, low, sun, x, y = _sky(rng, n, .3, .6, days, .5)
    soil, mountain = _tint(rng, *_SOILS[kind]), kind == "mountain"
    for z in (.3, .65, 1.):
        r = 1.6 - 2 * np.abs(_ridge(rng, n, 4)) if mountain else _ridge(rng, n, 3)
        up, rock = hz - (.16 if mountain else .05) * (1.1 - z) * (1 + r), _creases(rng, n, (4, 5))
        below, light = _ramp(y - up, 0, .008), 1 + .22 * (rock - .4) * (kind in ("mountain", "snow"))
        _lay(img, below, _shade(_mix(low, soil * .8, z), light))
        if mountain: _lay(img, _ramp(up + .05 + .03 * rock - y, 0, .02) * below * (1.2 - z), _rgb("f4f6fa"))
    t = (y - hz).clip(.004)
    if kind == "desert": wave = np.sin(80 * np.log(t + .05) + 3 * _noise(rng, n, n, (3, 3), 3))
    elif kind == "rows": wave = np.sin(26 * ((x - .5) / (t + .15)) + 6 * rng.random())
    else: wave = _creases(rng, n, {"savanna": (30, 8), "mountain": (50, 20), "snow": (3, 2)}[kind])
    land = _blend(soil * .72, soil * 1.08, .5 + .4 * wave)
    _lay(img, _ramp(y, hz, hz + .02), _shade(land, _mix(.9, 1., _ramp(y, hz, 1))))
    for a in rng.random(rng.integers(1, 6)):
        b = hz + .02 + .4 * rng.random()**2
        if kind != "rows": _lay(img, *_plant(rng, n, kind, a, b, .10 + .5 * (b - hz), low))
    if kind == "snow":
        a, b, r = rng.random(70), rng.random(70), rng.uniform(2, 7, 70) / (2 * n)
        _lay(img, _stencil(n, ellipses=np.stack([a, b, a + r, b + r], 1)) * .8, _rgb("ffffff"))
    return img

def _indoor(rng, n):
    """A papered wall with windows or pictures over a floor of boards."""
    (y, x), hz = _grid(n), rng.uniform(.62, .82)
    wall = _tint(rng, "d9c6a5", "9fb8b4", "c88f7f", "8f9fbf", "c9c0d0", "7f9a6f", "5a7a8f", amount=1.5)
    wood, k, style = _tint(rng, "9a6a42", amount=1.5), rng.uniform(40, 90), rng.integers(3)
    papers = (.07 * np.sign(np.sin(k * x)), .09 * (np.sin(k * x) * np.sin(k * y) > .5),
              .05 * np.sign(np.sin(k * (x + y)) * np.sin(k * (x - y))))
    img, u, v = _shade(wall, 1 + papers[style]), (x - .5) / (y - hz + .35), 1 / (y - hz + .35).clip(.1)
    boards = 1 + .12 * np.sin(9 * np.floor(u * 7) + 3) + .06 * np.sin(90 * u + 9 * v) - .3 * (np.abs(u * 7 % 1) < .05)
    _lay(img, y > hz, _shade(wood, boards))
    _lay(img, np.abs(y - hz) < .018, _mix(wall, _rgb("ffffff"), .6))
    for a in rng.uniform(.05, .7, rng.integers(1, 4)):
        b, w, h = rng.uniform(.05, .25), rng.uniform(.15, .3), rng.uniform(.15, .35)
        box = lambda e: (x > a - e) & (x < a + w + e) & (y > b - e) & (y < b + h + e)
        _lay(img, box(.02), wood * .7)
        view = _blend(_tint(rng, "b8d0e0", amount=3), _tint(rng, "7f9a5a", amount=3), _ramp(y, b + .4 * h, b + .7 * h))
        _lay(img, box(0), view)
    return _shade(img, 1.1 - .35 * np.hypot(x - rng.random(), y - .2))

def _abstract(rng, n, kind):
    """Patterned grounds: marble (warped bands), curtain (upright folds), strata (level layers)."""
    a, b, c = (_tint(rng, f"{v:06x}", amount=2) for v in rng.integers(0x303030, 0xe0e0e0, 3))
    k, (y, x) = rng.uniform(8, 24), _grid(n)
    if kind == "marble":
        t = np.sin(k * (x * rng.normal() + y * rng.normal()) + 2.5 * _noise(rng, n, n, (3, 3), 4))
        return _blend(_blend(a, b, .5 + .5 * t), c, _ramp(_creases(rng, n), .8, 1))
    if kind == "curtain":
        folds = np.sin(2 * k * x + 3 * np.sin(3 * x + a[0]) + .6 * y * rng.normal())
        cloth = _blend(a, b, _ramp(y + .1 * np.sin(k * x), rng.random(), 1.3))
        return _shade(_blend(cloth, c, .35 * (np.abs(np.sin(k * .5 * x)) > .9)), 1 + .3 * folds)
    t = y * k * .6 + _ridge(rng, n, 2)[None] * rng.uniform(.1, .8) + .3 * np.sin(7 * x + 9 * y)
    return _shade(np.stack([a, b, c, (a + b) / 2, (b + c) / 2])[np.floor(t).astype(int) % 5], .85 + .3 * (t % 1))

_LANDS, _WATERS = {"forest": _forest, "bamboo": _bamboo, "meadow": _meadow}, {"sea": _sea, "lake": _lake, "surf": _surf}
_PLACES = {**{k: functools.partial(_vista, kind=k) for k in _SOILS}, "indoor": _indoor,
           **{k: functools.partial(_abstract, kind=k) for k in ("marble", "curtain", "strata")}}
BACKGROUNDS = {"land": [*_LANDS], "water": [*_WATERS], "pretrain": [*_PLACES]}

def draw_background(kind, seed, size=224, difficulty=.5):
    """PIL RGB (size, size); difficulty in [0, 1] = how strongly the place shows through its haze."""
    rng = _rng(kind, seed)
    img = {**_LANDS, **_WATERS, **_PLACES}[kind](rng, size)
    haze = _tint(rng, "cfd8dc", "e6dcc4", "c4cfbf", "bfbfd0", "e0d0b4")
    return Image.fromarray(_mix(haze, img, .2 + .8 * difficulty**2).clip(0, 255).astype(np.uint8))
