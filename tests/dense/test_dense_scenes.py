import numpy as np
import pytest

from mtl_lora.cli import main
from mtl_lora.dense import scenes
from mtl_lora.dense.data import DenseDataset
from mtl_lora.dense.scenes import Body, Box, Cone, Sphere, Texture, World, rays, render, salient, scene, turn

PLAIN = Texture("plain", np.ones((2, 3)) / 2, np.eye(3), np.zeros(3), 0.0)
SIZE = 49


def world_of(*bodies: tuple, axes: np.ndarray = turn(0, 0.0)) -> World:  # noqa: B008
    """Bodies (shape, centre, rotation) in a room of 20 x 20 x 20 around the eye, with one lamp."""
    room = Body(Box(np.full(3, 10.0), scenes.WALL, inside=True), np.zeros(3), np.eye(3), dict.fromkeys(range(3), PLAIN))
    rest = [Body(shape, np.array(centre), turned, {shape.label: PLAIN}) for shape, centre, turned in bodies]
    return World([room, *rest], [(np.array([0.0, -5.0, 0.0]), np.ones(3))], 0.5, np.zeros(3), axes, 1.0)


def rendered(world: World) -> scenes.Scene:
    return render(world, SIZE, np.random.default_rng(0))


def test_sphere_has_the_depth_and_the_normals_that_one_works_out():
    """Of radius 1 at z = 5: the ray (x, y, 1) with q = x^2 + y^2 + 1 meets it at (5 - sqrt(25 - 24 q)) / q."""
    found = rendered(world_of((Sphere(1.0, scenes.SPHERE), [0, 0, 5.0], np.eye(3))))
    middle = SIZE // 2
    assert found.depth[middle, middle] == pytest.approx(4.0)
    assert found.normals[middle, middle].tolist() == pytest.approx([0, 0, -1])
    x, y = 5 / SIZE, -3 / SIZE
    q = x * x + y * y + 1
    z = (5 - np.sqrt(25 - 24 * q)) / q
    assert found.depth[middle - 3, middle + 5] == pytest.approx(z, rel=1e-6)
    assert found.normals[middle - 3, middle + 5] == pytest.approx([x * z, y * z, z - 5], abs=1e-6)
    wall, corner = scenes.WALL, found.depth[0, 0]
    assert (found.semseg[0, 0], corner) == (wall, pytest.approx(10.0))  # the far wall of the room, wherever it is hit
    assert found.sal.sum() == (found.semseg == scenes.SPHERE).sum() > 50


@pytest.mark.parametrize("index", [0, 1, 2])
def test_normals_are_those_of_the_depth_map(index):
    """Unit vectors, and inside of a surface the cross product of the steps to the neighbouring pixels' points."""
    made = scene(3, "train", index, 96)
    draw = np.random.default_rng([3, 0, index])
    focal = scenes.draw_world(draw).focal
    assert np.allclose(np.linalg.norm(made.normals, axis=2), 1, atol=1e-5)
    places = ((np.arange(96) + 0.5) / 96 - 0.5) / focal
    points = made.depth[..., None].astype(float) * np.stack([*np.meshgrid(places, places), np.ones((96, 96))], axis=-1)
    along = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(down, along)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    agree = (normals * made.normals[1:-1, 1:-1]).sum(axis=2)
    edge = made.edge.astype(bool)
    near = edge[1:-1, 1:-1] | edge[1:-1, :-2] | edge[:-2, 1:-1] | edge[2:, 1:-1] | edge[1:-1, 2:]
    flat = ~near & np.isin(made.semseg[1:-1, 1:-1], [scenes.FLOOR, scenes.WALL, scenes.CEILING, scenes.BOX])
    assert flat.mean() > 0.3 and agree[flat].min() > 0.9999
    assert np.quantile(agree[~near], 0.01) > 0.98  # on round ones up to their curvature within two pixels
    assert (made.normals * points).sum(axis=2).max() < 0  # every surface that is seen faces the eye


def inside(shape, points: np.ndarray) -> np.ndarray:
    """Which points lie in a shape, from its definition."""
    x, y, z = points.T
    if isinstance(shape, Box):
        return (np.abs(points) < shape.size).all(axis=1)
    if isinstance(shape, Sphere):
        return (points**2).sum(axis=1) < shape.size**2
    bottom, top, half = shape.size
    return (np.abs(y) < half) & (np.hypot(x, z) < (bottom + top) / 2 + (bottom - top) / (2 * half) * y)


@pytest.mark.parametrize(
    "shape",
    [
        Box(np.array([0.5, 0.8, 0.3])),
        Sphere(0.7, scenes.SPHERE),
        Cone((0.6, 0.6, 0.5), scenes.CYLINDER),
        Cone((0.7, 0.0, 0.6), scenes.CONE),
        Cone((0.7, 0.3, 0.6), scenes.CONE),
    ],
    ids=["box", "sphere", "cylinder", "cone", "blunt cone"],
)
def test_ray_meets_a_shape_where_small_steps_along_it_first_get_inside(shape):
    draw = np.random.default_rng(0)
    origin = draw.normal(size=(300, 3))
    origin *= 3 / np.linalg.norm(origin, axis=1, keepdims=True)
    direction = draw.normal(scale=0.4, size=(300, 3)) - origin
    found = shape.hit(origin, direction)
    steps = np.linspace(0, 2, 2001)
    entered = np.stack([inside(shape, origin + t * direction) for t in steps], axis=1)
    expected = np.where(entered.any(axis=1), steps[entered.argmax(axis=1)], np.inf)
    missed = np.isinf(found) != np.isinf(expected)
    assert missed.mean() < 0.02 and np.isfinite(found).sum() > 30  # a ray may graze it between two steps
    both = np.isfinite(found) & np.isfinite(expected)
    assert np.abs(found[both] - expected[both]).max() < 2e-3
    points = origin[both] + found[both, None] * direction[both]
    normals, _ = shape.surface(points)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1)
    outside = ~inside(shape, points + 1e-5 * normals) & inside(shape, points - 1e-5 * normals)
    assert outside.mean() > 0.97  # the normal points out; at a rim it may leave the other face


def test_camera_turns_the_labels_with_it():
    """A camera that looks down at the floor sees a normal that points at it; the room's faces keep their classes."""
    down = turn(0, -np.pi / 2)
    found = rendered(world_of(axes=down))
    assert set(found.semseg[20:30, 20:30].ravel()) == {scenes.FLOOR}
    assert np.allclose(found.normals[24, 24], [0, 0, -1], atol=1e-6) and found.depth[24, 24] == pytest.approx(10)
    assert np.allclose(rays(world_of(), 1)[0], [0, 0, 1])


def test_salient_object_is_large_and_central():
    body = np.zeros((9, 9), int)
    body[4, 4], body[:, :3] = 1, 2  # one pixel in the middle against three columns at the side
    centres = (np.arange(9) + 0.5) / 9 - 0.5
    gaussian = np.exp(-(centres**2) / (2 * 0.25**2))
    assert gaussian[:3].sum() * gaussian.sum() > 1
    assert (salient(body) == (body == 2)).all()
    body[:, :3], body[3:6, 3:6] = 0, 1
    body[0, 0] = 2
    assert (salient(body) == (body == 1)).all()
    body[:, :3] = 2  # against nine in the middle, whose weights are 7.9 to 7.0; of a wider Gaussian they would lose
    assert gaussian[3:6].sum() ** 2 > gaussian[:3].sum() * gaussian.sum()
    assert (salient(body) == (body == 1)).all()
    assert not salient(np.zeros((9, 9), int)).any()


def test_no_object_stands_in_another():
    """Some stand on top of others, and there is one place on each."""
    raised = 0
    for seed in range(60):
        _, *bodies = scenes.draw_world(np.random.default_rng(seed)).bodies
        for body in bodies:
            others = [other for other in bodies if other is not body]
            centres = [((body.centre - other.centre) @ other.rotation)[None] for other in others]
            assert not any(inside(other.shape, at).any() for other, at in zip(others, centres, strict=True))
        raised += max(body.centre[1] for body in bodies) - min(body.centre[1] for body in bodies) > 1
    assert raised > 5


def test_prepared_folder_has_the_same_bytes_however_many_are_made(tmp_path, capsys):
    options = ["--size", "24", "--seed", "5", "--test", "1"]
    for name, count in (("a", "2"), ("b", "3")):
        main(["prepare", "scenes", "--train", count, "--output_dir", str(tmp_path / name), *options])
    bytes_of = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*_00000*")}
        for name in "ab"
    }
    assert len(bytes_of["a"]) == 18 and bytes_of["a"].items() <= bytes_of["b"].items()
    data = DenseDataset(tmp_path / "a", "train", size=24, augmentation="auto")
    made, item = scene(5, "train", 1, 24), DenseDataset(tmp_path / "a", "train", size=24)[1]
    assert data.ids == ["train_000000", "train_000001"] and len(data) == 2
    labels = item["labels"]
    assert (labels["semseg"].numpy() == made.semseg).all() and (labels["sal"][0].numpy() == made.sal).all()
    assert np.allclose(labels["depth"][0], made.depth)
    assert np.allclose(labels["normals"].permute(1, 2, 0), made.normals, atol=2e-3)
    assert (made.edge[:, :-1] >= (made.semseg[:, :-1] != made.semseg[:, 1:])).all()
    with pytest.raises(SystemExit):
        main(["prepare", "scenes", "--output_dir", str(tmp_path / "a"), "--train", "1", *options])
    assert "--overwrite" in capsys.readouterr().err
