"""Render scenes of objects in a room, with exact labels, by the ray caster in this file. Nothing is downloaded.

    mtl-lora prepare scenes                                 500 training and 100 test images of 112 x 112 pixels
    mtl-lora prepare scenes --train 5000 --size 224 --seed 1

Writes a folder of images/, semseg/, depth/, normals/, sal/, edge/, train.txt, test.txt and tasks.json: the --data_path
of training and --data_dir of evaluation. An image depends only on its seed, split and number. Coordinates are the
camera's: x right, y down, z forward; the room has its floor at the largest y. The labels are:

    semseg    floor, wall, ceiling, box, sphere, cylinder, cone
    depth     z of the surface, in metres
    normals   the outward unit normal of the surface, on the side that is seen
    sal       the object (not the room) with the most visible pixels, each weighted by a Gaussian about the centre of
              the image: people look at what is large and in the middle
    edge      pixels whose right or lower neighbour is on another surface: another object, or another face
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_lora.config import Config, flag
from mtl_lora.dense.layouts import changes
from mtl_lora.dense.tasks import shipped
from mtl_lora.files import atomic_directory

SPLITS = ("train", "test")
FLOOR, WALL, CEILING, BOX, SPHERE, CYLINDER, CONE = range(7)  # classes, in the order of scenes_tasks.json
NEAR = 1e-3  # minimum t of a hit, so that a ray that begins on a surface does not hit it again
CENTRE = 0.25  # standard deviation of the Gaussian about the centre, in image sides


@dataclasses.dataclass
class Prepare(Config):
    """How many scenes to render, and where they go."""

    train: int = flag(500, "training images", min=1)
    test: int = flag(100, "test images", min=1)
    size: int = flag(112, "height and width in pixels", min=8, max=4096)
    seed: int = flag(0, "random seed of the scenes", min=0, max=2**32 - 1)
    output_dir: str = flag("data/scenes/rendered", "folder for the images and label maps", place=True)
    overwrite: bool = flag(False, "replace the output of an earlier command")


# ---- shapes: each in its own frame, with its centre at the origin and y down ----


class Shape:
    """A closed surface.

    ``hit`` returns the distances t (N,) at which rays origin + t direction enter it, inf for rays that miss it.
    ``surface`` returns the normals (N, 3) and face numbers (N,) of points (N, 3) on it.
    """

    radius: float  # of a bounding sphere about the centre

    def __init__(self, size: np.ndarray, label: int):
        self.size, self.label = size, label
        self.radius = float(np.linalg.norm(size))


class Box(Shape):
    """A box. size: half its extent along x, y and z. inside: seen from within, like a room."""

    def __init__(self, size: np.ndarray, label: int = BOX, inside: bool = False):
        super().__init__(size, label)
        self.inside = inside

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (-self.size - origin) / direction, (self.size - origin) / direction
        low, high = np.minimum(first, second).T, np.maximum(first, second).T
        enter, leave = np.fmax(np.fmax(low[0], low[1]), low[2]), np.fmin(np.fmin(high[0], high[1]), high[2])
        if self.inside:
            return leave
        return np.where((enter < leave) & (enter > NEAR), enter, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        relative = points / self.size
        axis = np.abs(relative).argmax(axis=1)
        side = np.sign(relative[np.arange(len(points)), axis])
        normals = np.zeros_like(points)
        normals[np.arange(len(points)), axis] = -side if self.inside else side
        return normals, 2 * axis + (side > 0)


class Sphere(Shape):
    """A sphere. size: its radius."""

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        a, b, c = _dot(direction, direction), _dot(origin, direction), _dot(origin, origin) - self.size**2
        inside = b * b - a * c
        root = np.sqrt(np.maximum(inside, 0))
        near, far = (-b - root) / a, (-b + root) / a
        t = np.where(near > NEAR, near, far)
        return np.where((inside > 0) & (t > NEAR), t, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return points / self.size, np.zeros(len(points), int)


class Cone(Shape):
    """An upright cone with flat ends, or a cylinder if both radii are equal. size: (radius at the bottom, radius at the
    top, half the height)."""

    @property
    def slope(self) -> float:
        """How fast the radius grows with y."""
        bottom, top, half = self.size
        return (bottom - top) / (2 * half)

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        bottom, top, half = self.size
        slope = self.slope
        radius = (bottom + top) / 2 + slope * origin[..., 1]
        growth = slope * direction[..., 1]
        flat = [0, 2]
        a = _dot(direction[:, flat], direction[:, flat]) - growth**2
        b = _dot(origin[..., flat], direction[:, flat]) - radius * growth
        c = _dot(origin[..., flat], origin[..., flat]) - radius**2
        found = np.full(len(direction), np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(b * b - a * c)
            for t in ((-b - root) / a, (-b + root) / a):
                y = origin[..., 1] + t * direction[..., 1]
                # The equation also describes the cone's mirror image beyond the tip, where the radius is negative.
                valid = (t > NEAR) & (np.abs(y) <= half) & (radius + growth * t >= 0)
                found = np.where(valid & (t < found), t, found)
            for y, limit in ((half, bottom), (-half, top)):
                t = (y - origin[..., 1]) / direction[..., 1]
                across = (origin + t[:, None] * direction)[:, flat]
                across = _dot(across, across)
                found = np.where((t > NEAR) & (across <= limit**2) & (t < found), t, found)
        return found

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bottom, top, half = self.size
        x, y, z = points.T
        distance = np.maximum(np.hypot(x, z), 1e-9)
        flat = half - np.abs(y) < 1e-4 * half
        flat &= distance < (bottom + top) / 2 + self.slope * y - 1e-4 * bottom
        side = np.stack([x / distance, np.full_like(x, -self.slope), z / distance], axis=1)
        side /= math.hypot(1, self.slope)
        ends = np.stack([np.zeros_like(y), np.sign(y), np.zeros_like(y)], axis=1)
        return np.where(flat[:, None], ends, side), np.where(flat, 1 + (y > 0), 0)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the dot products of vectors (N, k) or (k,)."""
    return np.einsum("...i,...i->...", first, second)


# ---- textures: a colour for every point of a body ----


@dataclasses.dataclass
class Texture:
    """A pattern in space that gives points their colours. gloss: strength of the highlight, 0 to 1."""

    pattern: str
    colours: np.ndarray  # (2, 3), 0 to 1
    waves: np.ndarray  # (3, 3): one direction per row, its length the frequency
    shift: np.ndarray  # (3,)
    gloss: float

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the colours (N, 3) of points (N, 3)."""
        first, second = self.colours
        return first + self._mixture(points + self.shift)[:, None] * (second - first)

    def _mixture(self, points: np.ndarray) -> np.ndarray:
        along = points @ self.waves.T
        if self.pattern == "checks":
            return np.floor(along).sum(axis=1) % 2
        if self.pattern == "stripes":
            return (np.sin(2 * math.pi * along[:, 0]) > 0).astype(float)
        if self.pattern == "dots":
            return (((along % 1 - 0.5) ** 2).sum(axis=1) < 0.12).astype(float)
        if self.pattern == "rings":
            wave = 8 * np.hypot(points[:, 0], points[:, 2]) + np.sin(2 * along[:, 1])
            return 0.5 + 0.5 * np.sin(wave)
        if self.pattern == "clouds":
            waves = np.sin(2 * along + np.sin(3 * along[:, [1, 2, 0]])) + np.sin(5 * along[:, [2, 0, 1]]) / 2
            return np.clip(0.5 + waves.mean(axis=1), 0, 1)
        return np.zeros(len(points))


PATTERNS = ("plain", "checks", "stripes", "dots", "rings", "clouds")


def _texture(draw: np.random.Generator, room: bool) -> Texture:
    hue, value = draw.random(2), draw.uniform(0.3, 0.95, 2)
    saturation = draw.uniform(0.0, 0.35 if room else 0.9, 2)
    wheel = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    colours = value[:, None] * (1 + saturation[:, None] * (np.clip(wheel, 0, 1) - 1))
    turned = np.linalg.qr(draw.normal(size=(3, 3)))[0] if draw.random() < 0.5 else np.eye(3)
    waves = turned * draw.uniform(0.8, 2.0) * (1 if room else 2.5)
    pattern = PATTERNS[draw.integers(len(PATTERNS))]
    return Texture(pattern, colours, waves, draw.uniform(0, 7, 3), draw.random() * (0.2 if room else 0.8))


# ---- a scene ----


@dataclasses.dataclass
class Body:
    """A shape in the world. rotation: (3, 3), from the shape's frame to the world's. centre: (3,), in the world."""

    shape: Shape
    centre: np.ndarray
    rotation: np.ndarray
    textures: dict[int, Texture]  # by class

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Return the distances of rays in the world, see ``Shape``."""
        away, length = self.centre - origin, _dot(direction, direction)
        apart = _dot(away, away) - _dot(away, direction) ** 2 / length  # squared distance of the centre from the ray
        passing = np.flatnonzero(apart < self.shape.radius**2)
        found = np.full(len(direction), np.inf)
        own = -away[passing] if away.ndim == 2 else -away
        found[passing] = self.shape.hit(own @ self.rotation, direction[passing] @ self.rotation)
        return found


@dataclasses.dataclass
class World:
    """Bodies (the room first), point lights (position, colour) and a camera at ``eye``. axes: (3, 3), from the camera's
    frame to the world's. focal: focal length in image sides."""

    bodies: list[Body]
    lights: list[tuple[np.ndarray, np.ndarray]]
    ambient: float
    eye: np.ndarray
    axes: np.ndarray
    focal: float


def turn(axis: int, angle: float) -> np.ndarray:
    """Return the rotation (3, 3) about an axis by an angle in radians."""
    found, (first, second) = np.eye(3), [other for other in range(3) if other != axis]
    found[[first, second], [first, second]] = math.cos(angle)
    found[first, second], found[second, first] = -math.sin(angle), math.sin(angle)
    return found


def draw_world(draw: np.random.Generator) -> World:
    """Return a random room with up to nine objects on its floor, some on top of others."""
    half = np.array([draw.uniform(1.8, 4), draw.uniform(1.1, 1.7), draw.uniform(2.5, 4.5)])
    centre = np.array([draw.uniform(-0.6, 0.6), 0, half[2] - 0.6])
    textures = {label: _texture(draw, True) for label in (FLOOR, WALL, CEILING)}
    room = Body(Box(half, WALL, inside=True), centre, np.eye(3), textures)
    bodies, taken = [room], []
    for _ in range(draw.integers(3, 10)):
        body, wide, high = _object(draw)
        on = next((place for place in taken if place[4] and wide < place[2] and draw.random() < 0.4), None)
        for _ in range(12):
            x = draw.uniform(-1, 1) * (half[0] - wide) + centre[0]
            z = draw.uniform(1.2 + wide, 2 * half[2] - 0.6 - wide)
            free = all(math.hypot(x - other[0], z - other[1]) > wide + other[2] for other in taken)
            if on or (free and abs(x) < 0.7 * z):
                break
        else:
            continue
        floor = half[1]
        if on:
            x, z, floor = on[0], on[1], on[3]
            taken.remove(on)
        body.centre = np.array([x, floor - high, z])
        flat_top = isinstance(body.shape, Box) and not on
        taken.append((x, z, wide, floor - 2 * high, flat_top))
        bodies.append(body)
    lights = []
    for _ in range(draw.integers(1, 3)):
        place = centre + half * np.array([draw.uniform(-0.8, 0.8), draw.uniform(-0.95, -0.5), draw.uniform(-0.7, 0.5)])
        lights.append((place, draw.uniform(0.7, 1.0, 3) * draw.uniform(4, 8)))
    eye = np.array([0, draw.uniform(-0.7, 0.3), 0])
    axes = turn(1, draw.uniform(-0.25, 0.25)) @ turn(0, draw.uniform(-0.4, 0.05)) @ turn(2, draw.uniform(-0.08, 0.08))
    return World(bodies, lights, draw.uniform(0.25, 0.5), eye, axes, draw.uniform(0.75, 1.2))


def _object(draw: np.random.Generator) -> tuple[Body, float, float]:
    """Return (a random object without a position, the radius of the floor that it covers, half its height)."""
    kind = draw.integers(BOX, CONE + 1)
    radius, half = draw.uniform(0.2, 0.55), draw.uniform(0.2, 0.6)
    rotation, wide = turn(1, draw.uniform(0, math.pi)), radius
    if kind == BOX:
        size = np.array([radius, half, draw.uniform(0.2, 0.55)])
        shape, wide = Box(size), math.hypot(size[0], size[2])
    elif kind == SPHERE:
        shape, half = Sphere(radius, SPHERE), radius
    elif kind == CYLINDER:
        shape = Cone((radius, radius, half), CYLINDER)
        if draw.random() < 0.3:  # lying
            rotation, wide, half = rotation @ turn(0, math.pi / 2), math.hypot(radius, half), radius
    else:
        shape = Cone((radius, draw.choice([0.0, 0.4]) * radius, half), CONE)
    return Body(shape, np.zeros(3), rotation, {shape.label: _texture(draw, False)}), wide, half


# ---- rendering ----


@dataclasses.dataclass
class Hits:
    """The hits of N rays: distance, body, point in the world, class, face, normal in the world, and texture colour."""

    t: np.ndarray
    body: np.ndarray
    points: np.ndarray
    label: np.ndarray
    face: np.ndarray
    normals: np.ndarray
    colours: np.ndarray


def cast(world: World, directions: np.ndarray) -> Hits:
    """Return the first hit of each ray (N, 3) from the eye. Every ray hits something, because the room is closed."""
    distances = np.stack([body.hit(world.eye, directions) for body in world.bodies])
    nearest = distances.argmin(axis=0)
    t = distances[nearest, np.arange(len(directions))]
    points = world.eye + t[:, None] * directions
    hits = Hits(t, nearest, points, *(np.zeros(len(t), int) for _ in range(2)), *np.zeros((2, len(t), 3)))
    for index, body in enumerate(world.bodies):
        of_body = np.flatnonzero(nearest == index)
        own = (points[of_body] - body.centre) @ body.rotation
        normals, face = body.shape.surface(own)
        hits.normals[of_body], hits.face[of_body] = normals @ body.rotation.T, face
        label = np.full(len(of_body), body.shape.label)
        if index == 0:  # the room: face 2 is the ceiling and 3 the floor, because y points down
            label = np.select([face == 2, face == 3], [CEILING, FLOOR], WALL)
        hits.label[of_body] = label
        for one, texture in body.textures.items():
            hits.colours[of_body[label == one]] = texture(own[label == one])
    return hits


def shade(world: World, hits: Hits, directions: np.ndarray) -> np.ndarray:
    """Return the colours (N, 3), 0 to 1: ambient light, and the Lambert and Blinn terms of each visible light."""
    found = world.ambient * hits.colours
    gloss = np.array([max(each.gloss for each in body.textures.values()) for body in world.bodies])[hits.body]
    view = -directions / np.sqrt(_dot(directions, directions))[:, None]
    for place, colour in world.lights:
        path = place - hits.points
        distance = np.sqrt(_dot(path, path))
        toward = path / distance[:, None]
        facing = _dot(hits.normals, toward)
        lit = facing > 0
        start, way = hits.points[lit] + 1e-3 * hits.normals[lit], path[lit]
        hidden = np.zeros(len(start), bool)
        for body in world.bodies[1:]:  # the room hides nothing
            hidden |= body.hit(start, way) < 1
        lit[lit] = ~hidden
        half = toward + view
        highlight = gloss * np.clip(_dot(hits.normals, half) / np.sqrt(_dot(half, half)), 0, 1) ** 30
        power = np.where(lit, 1 / (1 + distance**2), 0)[:, None] * colour
        found += power * (np.clip(facing, 0, 1)[:, None] * hits.colours + highlight[:, None])
    return np.clip(found, 0, 1)


def rays(world: World, size: int, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    """Return the directions (size * size, 3), in the world, of rays through the point (x, y) of each pixel.

    x, y: from the pixel's corner, 0 to 1. In the camera's frame the directions have z = 1.
    """
    x, y = (((np.arange(size) + inside) / size - 0.5) / world.focal for inside in (x, y))
    x, y = np.meshgrid(x, y)
    return np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3) @ world.axes.T


@dataclasses.dataclass
class Scene:
    """An image (S, S, 3) of 0 to 255 with its maps (S, S), and normals (S, S, 3)."""

    image: np.ndarray
    semseg: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    sal: np.ndarray
    edge: np.ndarray


def render(world: World, size: int, draw: np.random.Generator) -> Scene:
    """Return a world as its camera sees it: colours from two rays per pixel with some noise, labels from pixel centres.

    A ray's direction has z = 1 in the camera's frame, so its distance t is the depth.
    """
    directions = rays(world, size)
    hits = cast(world, directions)
    shape = (size, size)
    shots = [rays(world, size, *place) for place in ((0.25, 0.3), (0.75, 0.7))]
    colours = sum(shade(world, cast(world, shot), shot) for shot in shots).reshape(*shape, 3) / len(shots)
    colours = colours ** (1 / draw.uniform(1.2, 2.2)) + draw.normal(scale=draw.uniform(0.005, 0.03), size=colours.shape)
    body = hits.body.reshape(shape)
    return Scene(
        image=np.round(255 * np.clip(colours, 0, 1)).astype(np.uint8),
        semseg=hits.label.reshape(shape).astype(np.uint8),
        depth=hits.t.reshape(shape).astype(np.float32),
        normals=(hits.normals @ world.axes).reshape(*shape, 3).astype(np.float32),
        sal=salient(body),
        edge=changes(body * 8 + hits.face.reshape(shape)),
    )


def salient(body: np.ndarray) -> np.ndarray:
    """Return a map (S, S), 1 on the salient object, else 0. body: (S, S), the body of each pixel, 0 for the room."""
    centres = (np.arange(len(body)) + 0.5) / len(body) - 0.5
    gaussian = np.exp(-(centres**2) / (2 * CENTRE**2))
    weights = np.bincount(body.ravel(), (gaussian[:, None] * gaussian).ravel())
    weights[0] = 0
    return ((body == weights.argmax()) & (body > 0)).astype(np.uint8)


def scene(seed: int, split: str, index: int, size: int) -> Scene:
    """Return scene ``index`` of a split, which is the same whatever else is rendered."""
    draw = np.random.default_rng([seed, SPLITS.index(split), index])
    return render(draw_world(draw), size, draw)


# ---- the data set ----


def run(config: Prepare) -> None:
    """Render the data set as a complete folder or not at all; raises ``UserError``."""
    counts, names = {"train": config.train, "test": config.test}, [task.name for task in shipped("scenes")]
    patterns = ["*.png", "*.npy", "*.txt", "tasks.json"]
    with atomic_directory(config.output_dir, patterns, config.overwrite, nested=True) as folder:
        for name in ("images", *names):
            (folder / name).mkdir()
        for split, count in counts.items():
            ids = [f"{split}_{index:06d}" for index in range(count)]
            for index, id in enumerate(ids):
                write(scene(config.seed, split, index, config.size), folder, id)
                if (index + 1) % 100 == 0:
                    print(f"{split}: {index + 1:,} of {count:,} images", file=sys.stderr)
            (folder / f"{split}.txt").write_text("".join(f"{id}\n" for id in ids))
        (folder / "tasks.json").write_bytes(Path(__file__).with_name("scenes_tasks.json").read_bytes())
    print(f"{config.train:,} training and {config.test:,} test images of {config.size} pixels in {config.output_dir}")


def write(made: Scene, folder: Path, id: str) -> None:
    """Write the files of one image."""
    Image.fromarray(made.image).save(folder / "images" / f"{id}.png")
    for name in ("semseg", "sal", "edge"):
        Image.fromarray(getattr(made, name)).save(folder / name / f"{id}.png")
    np.save(folder / "depth" / f"{id}.npy", made.depth)
    np.save(folder / "normals" / f"{id}.npy", made.normals.astype(np.float16))
