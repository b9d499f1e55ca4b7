"""Functions as data: Gaussian processes against their definitions, tasks, images and tables, and clear errors."""

import gzip
import io
import math
import struct
import zipfile

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.data import Curves, Images, Table
from experiments.data.functions import RBF, Matern52, Mixture, Periodic, WeaklyPeriodic, gaussian_process
from experiments.data.functions.batches import Sizes
from experiments.data.functions.image_files import read_idx, read_omniglot
from experiments.data.functions.table import read_table

KERNELS = [RBF(), Matern52(), Periodic(), WeaklyPeriodic(), Mixture()]
NOISE = 0.1


def process(kernel, points=9, tasks=3):
    """Points of curves: x, y, the noisy covariance and the hyper-parameters."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(tasks, points, dtype=torch.float64, generator=generator) - 2
    parameters = kernel.parameters(tasks, generator)
    covariance = kernel.covariance(x.unsqueeze(-1) - x.unsqueeze(-2), parameters)
    covariance = covariance + NOISE**2 * torch.eye(points).double()
    y = torch.randn(tasks, points, dtype=torch.float64, generator=generator)
    return x, y, covariance, parameters


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_exact_likelihood_is_that_of_the_conditional_distribution(kernel):
    """By the textbook's formula, for tasks of ragged sizes."""
    _, y, covariance, _ = process(kernel)
    contexts, targets = torch.tensor([0, 4, 7]), torch.tensor([9, 3, 2])
    got = gaussian_process.log_likelihood(covariance, y, contexts, targets)
    for task, (c, n) in enumerate(zip(contexts.tolist(), targets.tolist(), strict=True)):
        K, t = covariance[task], slice(c, c + n)
        gain = K[t, :c] @ torch.linalg.inv(K[:c, :c])
        mean, conditional = gain @ y[task, :c], K[t, t] - gain @ K[:c, t]
        joint = torch.distributions.MultivariateNormal(mean, conditional).log_prob(y[task, t])
        marginal = torch.distributions.Normal(mean, conditional.diagonal().sqrt()).log_prob(y[task, t])
        assert_close(got.joint[task], joint / n)
        assert_close(got.marginal[task], marginal.mean())
        exact = gaussian_process.posterior(
            K[None, :c, :c], K[None, t, :c], K.diagonal()[None, t], y[task : task + 1, :c]
        )
        assert_close(exact.mean[0], mean)
        assert_close(exact.std[0], conditional.diagonal().sqrt())


def sklearn_kernel(kernel, parameters, task):
    kernels = pytest.importorskip(
        "sklearn.gaussian_process.kernels", reason="scikit-learn is not installed (extra dev)"
    )

    def scaled(of_unit_scale, scale):
        return kernels.ConstantKernel(scale**2) * of_unit_scale

    def rbf(length, scale):
        return scaled(kernels.RBF(length), scale)

    def periodic(length, scale, period):
        return scaled(kernels.ExpSineSquared(length, period), scale)

    theirs = {
        RBF: rbf,
        Matern52: lambda length, scale: scaled(kernels.Matern(length, nu=2.5), scale),
        Periodic: periodic,
        WeaklyPeriodic: lambda *values: rbf(*values[:2]) * periodic(*values[2:]),
        Mixture: lambda *values: rbf(*values[:2]) + rbf(*values[2:]),
    }
    return theirs[type(kernel)](*(value[task].item() for value in parameters)) + kernels.WhiteKernel(NOISE**2)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_exact_likelihood_is_scikit_learns(kernel):
    x, y, covariance, parameters = process(kernel)
    c, n = 5, 4
    got = gaussian_process.log_likelihood(covariance, y, torch.full((3,), c), torch.full((3,), n))
    for task in range(3):
        fixed = sklearn_kernel(kernel, parameters, task)
        from sklearn.gaussian_process import GaussianProcessRegressor

        regressor = GaussianProcessRegressor(fixed, alpha=0, optimizer=None).fit(x[task, :c, None], y[task, :c])
        mean, conditional = map(torch.from_numpy, regressor.predict(x[task, c:, None].numpy(), return_cov=True))
        joint = torch.distributions.MultivariateNormal(mean, conditional).log_prob(y[task, c:])
        assert_close(got.joint[task], joint / n)
        marginal = torch.distributions.Normal(mean, conditional.diagonal().sqrt()).log_prob(y[task, c:])
        assert_close(got.marginal[task], marginal.mean())


def test_a_covariance_without_noise_is_factored_and_what_is_none_refused():
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[None]
    smooth = RBF((1, 1), (1, 1))
    covariance = smooth.covariance(x.unsqueeze(-1) - x.unsqueeze(-2), smooth.parameters(1, torch.Generator()))
    L = gaussian_process.cholesky(covariance)
    assert_close(L @ L.mT, covariance, rtol=0, atol=1e-6)
    with pytest.raises(ExperimentError, match="not positive"):
        gaussian_process.cholesky(-covariance)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_sizes_are_uniform_between_their_numbers(is_ragged):
    sizes, generator = Sizes((2, 5), (3, 6), most=9), torch.Generator().manual_seed(0)
    drawn = [sizes.draw(torch.full((16,), 100), generator, is_ragged) for _ in range(400)]
    contexts, targets = (torch.stack(numbers) for numbers in zip(*drawn, strict=True))
    assert (contexts[0] != contexts[0, 0]).any() == is_ragged
    assert sorted(contexts.unique().tolist()) == [2, 3, 4, 5]
    for c in range(2, 6):
        of_size = targets[contexts == c]
        highest = min(6, 9 - c)
        shares = torch.stack([(of_size == n).double().mean() for n in range(3, highest + 1)])
        assert_close(shares, torch.full_like(shares, 1 / (highest - 2)), rtol=0, atol=0.1)
        assert of_size.max() == highest
    few, rest = Sizes((2, 5), None).draw(torch.tensor([3, 4, 50]), generator, True)
    assert (few + rest).tolist() == [3, 4, 50]
    assert (rest >= 1).all()


def curves(**settings):
    data = Curves(test_kernels=[RBF(), Periodic()], **({"epoch": 4, "valid_tasks": 8, "test_tasks": 24} | settings))
    data.setup()
    return data


def same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert_close(tuple(batch), tuple(other), rtol=0, atol=0)


def tensors(batch):
    return [value for value in batch if isinstance(value, torch.Tensor)]


def test_evaluation_is_fixed_and_training_is_always_new():
    data = curves(seed=1)
    tested = list(data.test_dataloader())
    assert [(batch.name, batch.index) for batch in tested] == [("rbf", 0), ("rbf", 1), ("periodic", 0), ("periodic", 1)]
    same(map(tensors, tested), map(tensors, curves(seed=2).test_dataloader()))
    assert_close(tested[0].ceiling, next(iter(data.test_dataloader())).ceiling)
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 4
    assert len({batch.target_y.sum().item() for batch in [*first, *second]}) == 8
    same(map(tensors, first), map(tensors, curves(seed=1).train_dataloader()))
    other = next(iter(curves(seed=2).train_dataloader()))
    assert other.target_y.sum() != first[0].target_y.sum()


def test_a_pass_goes_on_after_the_saved_batch():
    whole = curves(seed=1).train_dataloader()
    batches, stopped = [*whole, *whole], curves(seed=1).train_dataloader()
    stream = iter(stopped)
    for _ in range(3):
        next(stream)
    resumed = curves(seed=7).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    same(map(tensors, [*resumed, *resumed]), map(tensors, batches[3:]))
    with pytest.raises(ExperimentError, match="4 batches in an epoch, got 5"):
        curves(epoch=5).train_dataloader().load_state_dict(stopped.state_dict())


def test_processes_have_different_tasks_which_together_are_those_of_one():
    data = curves(seed=1, ragged=True)
    whole = next(iter(data.train_dataloader()))
    shares = []
    for rank in range(2):
        data._processes = lambda rank=rank: (rank, 2)
        shares.append(next(iter(data.train_dataloader())))
    for values, *parts in zip(*map(tensors, (whole, *shares)), strict=True):
        assert_close(torch.stack(parts, 1).flatten(0, 1), values)
    other = Curves(batch_size=3)
    other._processes = lambda: (0, 2)
    with pytest.raises(ExperimentError, match="expected a multiple of 2"):
        other.setup()


def png(size, ink):
    """A white image with a black square in its corner."""
    image = Image.new("1", (size, size), 1)
    image.paste(0, (0, 0, ink, ink))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def omniglot(tmp_path):
    """Two archives with one alphabet in both, told apart by their ink."""
    archives = {1: {"Greek": 8, "Latin": 8, "Tagalog": 8}, 2: {"Greek": 16, "Sanskrit": 8}}
    for number, alphabets in archives.items():
        with zipfile.ZipFile(tmp_path / f"images_background_small{number}.zip", "w") as file:
            for alphabet, ink in alphabets.items():
                for image in range(5):
                    file.writestr(f"archive{number}/{alphabet}/character01/{image:02}.png", png(32, ink))
    return tmp_path


def test_omniglot_has_each_alphabet_once(omniglot):
    alphabets = read_omniglot(omniglot, 4)
    assert {name: len(images) for name, images in alphabets.items()} == dict.fromkeys(
        ["Greek", "Latin", "Tagalog", "Sanskrit"], 5
    )
    corner = torch.zeros(4, 4, dtype=torch.uint8)
    corner[0, 0] = 255
    assert_close(alphabets["Greek"], corner.expand(5, 4, 4))


def test_images_are_functions_of_the_pixels_place(omniglot):
    data = Images(str(omniglot), size=4, context=(2, 6), targets=(1, 5), most=None, epoch=2)
    data.setup()
    assert {split: sets["omniglot"].count for split, sets in data._sets.items()} == {"train": 10, "valid": 5, "test": 5}
    [batch] = data.test_dataloader()
    assert batch.context_x.shape[1] + batch.target_x.shape[1] == 16, "all other pixels are targets"
    x, y = torch.cat([batch.context_x, batch.target_x], 1), torch.cat([batch.context_y, batch.target_y], 1)
    assert_close(y[..., 0], (x == -1).all(-1).float())
    assert len(x[0].unique(dim=0)) == 16
    with pytest.raises(ExperimentError, match=r"no alphabet 'Sanscrit'. Did you mean 'Sanskrit'"):
        Images(str(omniglot), test_alphabets=("Sanscrit",)).setup()
    with pytest.raises(ExperimentError, match="of 16 pixels"):
        Images(str(omniglot), size=4).setup()


def idx(images, magic=0x0803):
    return struct.pack(">4I", magic, *images.shape) + images.numpy().tobytes()


def test_idx_files_are_read_packed_or_not(tmp_path):
    images = torch.arange(5 * 3 * 2, dtype=torch.uint8).view(5, 3, 2)
    plain, packed = tmp_path / "plain", tmp_path / "packed.gz"
    plain.write_bytes(idx(images))
    packed.write_bytes(gzip.compress(idx(images)))
    assert_close(read_idx(plain), images)
    assert_close(read_idx(packed), images)
    data = Images(path=str(packed), test_path=str(plain), context=(1, 2), targets=(1, 2), most=None)
    data.setup()
    assert {split: sets["images"].count for split, sets in data._sets.items()} == {"train": 4, "valid": 1, "test": 5}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8), magic=0x0801), "0x0801, expected an IDX file"),
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8))[:-1], "got 17 bytes of pixels, expected 18"),
        (b"", "got 0 bytes"),
        (gzip.compress(b"abc", mtime=0)[:-3], "damaged"),
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8)), "got 2 images, expected at least 3"),
        (idx(torch.zeros(0, 3, 3, dtype=torch.uint8)), "got 0 images of 3 × 3, expected some, with pixels"),
        (idx(torch.zeros(4, 3, 0, dtype=torch.uint8)), "got 4 images of 3 × 0, expected some"),
    ],
)
def test_a_file_of_something_else_is_refused(content, part, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ExperimentError, match=part):
        Images(path=str(tmp_path / "file")).setup()


def test_images_of_another_size_for_the_test_are_refused(tmp_path):
    for name, size in (("train", 6), ("test", 5)):
        (tmp_path / name).write_bytes(idx(torch.zeros(4, 6, size, dtype=torch.uint8)))
    with pytest.raises(ExperimentError, match=r"--data.test_path: its images are 6 × 5, expected 6 × 6 as those of"):
        Images(path=str(tmp_path / "train"), test_path=str(tmp_path / "test"), most=None, context=(1, 2)).setup()


def table(path, **settings):
    return Table(str(path), **({"group": "who", "x": ["t", "u"], "y": ["v"], "context": (1, 3)} | settings))


@pytest.fixture
def csv_file(tmp_path):
    """Six groups of 3 to 8 rows with v = t + 10·group, as a spreadsheet writes it."""
    rows = [f'{t},{2 * t},"group {g}",{t + 10 * g}' for g in range(6) for t in range(3 + g)]
    path = tmp_path / "own.csv"
    path.write_text("\ufefft,u,who,v\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_tables_groups_are_functions(csv_file):
    data = table(csv_file, standardise=False, epoch=3)
    data.setup()
    assert data.features == (2, 1)
    sets = [functions for of_split in data._sets.values() for functions in of_split.values()]
    sizes = [size for functions in sets for size in functions.sizes.tolist()]
    assert sorted(sizes) == [3, 4, 5, 6, 7, 8], "every group is in one split"
    for batch in data.train_dataloader():
        assert batch.context_mask is not None
        for task in range(16):
            c, t = batch.context_mask[task], batch.target_mask[task]
            x, y = (
                torch.cat([batch.context_x[task, c], batch.target_x[task, t]]),
                torch.cat([batch.context_y[task, c], batch.target_y[task, t]]),
            )
            group = int((y[0, 0] - x[0, 0]) / 10)
            assert sorted(x[:, 0].tolist()) == list(range(3 + group)), "all rows of a group, each once"
            assert_close(y[:, 0], x[:, 0] + 10 * group)
            assert 1 <= c.sum() <= 3


def test_a_standardised_table_has_unit_variance(csv_file):
    data = table(csv_file)
    data.setup()
    [train] = data._sets["train"].values()
    rows = torch.cat([train.y[group, :size] for group, size in enumerate(train.sizes.tolist())])
    assert_close(rows.mean(0), torch.zeros(1), rtol=0, atol=1e-5)
    assert_close(rows.std(0, correction=0), torch.ones(1))


@pytest.mark.parametrize(
    ("settings", "cell", "parts"),
    [
        ({}, "many", ["own.csv, line 3, 'v': got 'many', expected a number"]),
        ({}, "", ["line 3", "got an empty cell"]),
        ({}, "nan", ["line 3", "got 'nan'"]),
        ({"y": ["w"]}, "1", ["--data.y", "no column 'w'", "Choices: t, u, who, v"]),
        ({"group": "whom"}, "1", ["--data.group", "Did you mean 'who'"]),
        ({"context": (3, 5)}, "1", ["the group 'group 0' has 3 rows, expected at least 4", "--data.context"]),
        ({"x": ["who"]}, "1", ["'who': got 'group 0'"]),
        ({"delimiter": ";"}, "1", ["no column 'who'", "Choices: t,u,who,v", "one cell alone: see --data.delimiter"]),
        ({}, "1,2", ["own.csv, line 3: got 5 cells, expected 4, as the header has"]),
        ({"valid": 0.6, "test": 0.3}, "1", ["got 6 groups by the column 'who', expected at least 7"]),
        ({"path": "other.csv"}, "1", ["other.csv: no such file", "--data.path"]),
        ({"path": ""}, "1", ["a folder, expected a CSV file", "--data.path"]),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(settings, cell, parts, csv_file):
    """With that cell in the third line."""
    lines = csv_file.read_text(encoding="utf-8").splitlines()
    lines[2] = f'1,2,"group 0",{cell}'
    csv_file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ExperimentError) as error:
        Table(**({"path": str(csv_file), "group": "who", "x": ["t"], "y": ["v"], "context": (1, 3)} | settings)).setup()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.csv: the file is empty, expected a header"),
        ("\n\n", "the file is empty"),
        ("t,who,v\n", "got 0 groups"),
        ("t,who,v\n1,,2\n", "line 2, 'who': got an empty cell, expected the group"),
        ("t,who,v\n1, ,2\n", "line 2, 'who': got an empty cell"),
        ("t,v,who\n1,2\n", "line 2: got 2 cells, expected 3"),
        ("t,v,who,v\n1,2,3,4\n", "own.csv has the column 'v' 2 times"),
    ],
)
def test_rows_and_headers_that_cannot_be_used_are_refused(text, message, tmp_path):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        table(tmp_path / "own.csv", x=["t"]).setup()


def test_groups_are_told_apart_by_what_is_written_and_empty_lines_are_none(tmp_path):
    (tmp_path / "own.csv").write_text("who,t,v,,\n3,1,2,,\n\n 3 ,3,4,,\nb,5,6,,\n")
    groups = read_table(tmp_path / "own.csv", "who", ["t"], ["v"])
    assert {name: x.flatten().tolist() for name, (x, _) in groups.items()} == {"3": [1, 3], "b": [5]}


def test_a_bound_on_points_without_targets_warns():
    with pytest.warns(UserWarning, match="--data.most: no effect without --data.targets"):
        table("own.csv", most=5)


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (lambda: Curves(batch_size=0), "batch_size"),
        (lambda: Curves(context=(4, 3)), "context"),
        (lambda: Curves(targets=(0, 3)), "targets"),
        (lambda: Curves(most=40), "most"),
        (lambda: Curves(eval_context=(-1, 3)), "eval_context"),
        (lambda: Curves(noise=math.nan), "noise"),
        (lambda: Curves(x_range=(1, 1)), "x_range"),
        (
            lambda: Curves(test_kernels=[RBF(), RBF((1, 1))]),
            "test_kernels: got rbf, rbf, .* each kind once.* a test of",
        ),
        (lambda: RBF(length=(0.5, 0.1)), "length"),
        (lambda: Periodic(period=(0, 1)), "period"),
        (lambda: Mixture([]), "lengths"),
        (lambda: Images(), "root"),
        (lambda: Images("a", valid=0.5), "valid"),
        (lambda: Table("a", "g", [], ["y"]), "data.x"),
        (lambda: Table("a", "g", ["x", "z"], ["y", "x"]), "--data.x, --data.y: got the column 'x' 2 times"),
        (lambda: Table("a", "g", ["x", "x"], ["y"]), "got the column 'x' 2 times"),
        (lambda: Table("a", "g", ["x"], ["y"], delimiter="tab"), "delimiter"),
        (lambda: Table("a", "g", ["x"], ["y"], valid=0), "valid"),
    ],
)
def test_settings_out_of_range_are_refused(build, setting):
    with pytest.raises(ExperimentError, match=setting):
        build()
