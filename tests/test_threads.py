"""Results do not depend on threads; nothing waits for ever when they change, or after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import needs_native

import snf_ext

COUNTS = (1, 2, 3, 5)
# Torch's matrix products and convolutions share their sums out by the number of threads; the last
# has its weight's gradient from one.
STOCK = {"snf_linear", "debias_linear", "snf_conv2d stock", "triangular_conv2d_solve"}


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operators():
    """Name, function and tensors of every operator, with work for several threads."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=draw)

    ops = torch.ops.snf_ext
    x, vectors = randn(37, 8, 7, 9), randn(300, 70)
    sets = randn(8, 7, 9, 5), randn(8, 7, 9, 5), randn(8, 7, 9, 4)
    own = randn(37, 8, 7, 9, 5), randn(37, 8, 7, 9, 5), randn(37, 8, 7, 9, 4)
    kernel = randn(8, 8, 3, 3, scale=0.1)
    lower = randn(8, 8, 2, 3, scale=0.02)
    lower[:, :, -1, -1] = lower[:, :, -1, -1] + torch.eye(8)
    square = randn(70, 70, scale=0.1)
    weights = [randn(*s, scale=0.2) for s in ((13, 8, 3, 3), (13,), (13, 13, 1, 1), (13,))]
    weights += [randn(*s, scale=0.2) for s in ((6, 13, 3, 3), (6,), (6, 1, 1))]
    many = randn(66, 66, 3, 3, scale=0.02)
    series = ([1.0, 1.0], 1.0)
    return {
        "snf_linear": (ops.snf_linear, (vectors, square, square.T, square[0]), ()),
        "snf_conv2d": (ops.snf_conv2d, (x, kernel, kernel, kernel[0, :, 0, 0]), ()),
        "snf_conv2d one tap": (ops.snf_conv2d, (x, *[kernel[..., :1, :1]] * 2, None), ()),
        "snf_conv2d stock": (ops.snf_conv2d, (randn(9, 66, 3, 4), many, many, None), ()),
        "image_network": (ops.image_network, (x, *weights), ()),
        "triangular_conv2d_solve": (ops.triangular_conv2d_solve, (x, lower), ()),
        "rq_spline": (ops.rq_spline, (x, *sets), (3.0,)),
        "rq_spline own": (ops.rq_spline, (x, *own), (3.0, True)),
        "smooth_leaky_relu": (ops.smooth_leaky_relu, (x,), (0.3,)),
        "smooth_leaky_relu_inverse": (ops.smooth_leaky_relu_inverse, (x,), (0.3,)),
        "logit": (ops.logit, (x.sigmoid(),), (1e-6,)),
        "normal_log_prob": (ops.normal_log_prob, (x,), ()),
        "actnorm": (ops.actnorm, (x, *weights[4][:2, :8, 0, 0]), ()),
        "affine_coupling": (ops.affine_coupling, (x, randn(37, 6, 7, 9)), ()),
        "debias_linear": (ops.debias_linear, (vectors.sign(), square, square), series),
        "debias_conv2d": (ops.debias_conv2d, (x.sign(), kernel, kernel, 1, 1, False), series),
    }


NAMES = list(operators()) if snf_ext.build_info()["cpp"] else []


def step(name, operator=None):
    """All outputs of an operator, and the gradients of their sum of squares."""
    function, tensors, rest = operator or operators()[name]
    leaves = [
        t.detach().requires_grad_(not name.startswith("debias")) if torch.is_tensor(t) else t
        for t in tensors
    ]
    outputs = function(*leaves, *rest)
    outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
    loss = sum(o.square().sum() + o.sum() for o in outputs if o.requires_grad)
    if torch.is_tensor(loss):
        used = [t for t in leaves if torch.is_tensor(t)]
        outputs += torch.autograd.grad(loss, used)
    return [o.detach() for o in outputs]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    return True


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_number(name):
    """The same bits; up to rounding where torch's products are the work."""
    results = []
    for count in COUNTS:
        torch.set_num_threads(count)
        results.append(step(name))
    agrees = close if name in STOCK else same_bits
    assert all(agrees(results[0], other) for other in results[1:])


MODELS = {
    "fc": lambda: (snf_ext.models.fc((1, 8, 8)), (1, 8, 8)),
    "conv": lambda: (snf_ext.models.conv((1, 8, 8), layers=3, blocks=3), (1, 8, 8)),
    "glow": lambda: (snf_ext.models.glow((1, 8, 8), levels=2, steps=2, width=16), (1, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_do_not_depend_on_the_number(name, backend):
    torch.manual_seed(3)
    model, shape = MODELS[name]()
    images = torch.randint(256, (16, *shape)).float()
    model.loss(images)  # starts layers that start themselves
    results = []
    for count in COUNTS:
        torch.set_num_threads(count)
        torch.manual_seed(4)
        model.zero_grad()
        loss = model.train().loss(images)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch.manual_seed(5)
        with torch.no_grad():
            nats = model.eval().log_prob(images)
        results.append([loss.detach(), nats, *(g.clone() for g in grads)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@needs_native
def test_the_number_may_change_meanwhile():
    """Torch keeps it for each thread that asks; others that set it disturb nobody."""
    cases = {name: operators()[name] for name in ("snf_conv2d", "rq_spline", "image_network")}
    before = {name: step(name, case) for name, case in cases.items()}
    stop = threading.Event()

    def change():
        count = 0
        while not stop.is_set():
            count = count % 5 + 1
            torch.set_num_threads(count)

    other = threading.Thread(target=change, daemon=True)
    other.start()
    try:
        for turn in range(15):
            for name, case in cases.items():
                torch.set_num_threads(turn % 4 + 1)
                assert same_bits(step(name, case), before[name])
    finally:
        stop.set()
        other.join(timeout=60)
    assert not other.is_alive()


@needs_native
def test_many_threads_at_once():
    """Forward and backward of all operators, each from several Python threads."""
    cases = operators()
    before = {name: step(name, case) for name, case in cases.items()}

    def work(seed):
        names = [*cases]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        for i in order.tolist():
            name = names[i]
            agrees = close if name in STOCK else same_bits
            assert agrees(before[name], step(name, cases[name])), name
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(12), timeout=120))


@needs_native
def test_one_graph_backward_from_many_threads():
    """The shared weight's gradient is the sum of all."""
    function, (x, w, r, c), _ = operators()["snf_conv2d"]
    w, r = w.clone().requires_grad_(), r.clone().requires_grad_()

    def work(part):
        z, _, recon = function(part, w, r, c)
        (z.square().sum() + recon.sum()).backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, x.double().float().split(5), timeout=120))
    together = w.grad.clone(), r.grad.clone()
    w.grad = r.grad = None
    work(x)
    close(together, (w.grad, r.grad))


@needs_native
def test_python_runs_while_an_operator_does():
    """The operators let go of the interpreter's lock: another thread counts meanwhile."""
    torch.set_num_threads(1)
    x, w = torch.randn(64, 16, 32, 32), torch.randn(16, 16, 3, 3)
    counted, done = 0, threading.Event()

    def work():
        for _ in range(5):
            torch.ops.snf_ext.snf_conv2d(x, w, w, None)
        done.set()

    interval = sys.getswitchinterval()
    other = threading.Thread(target=work)
    # Asked so seldom, a thread that holds the lock would not be made to let go.
    sys.setswitchinterval(1000)
    try:
        other.start()
        while not done.is_set():
            done.wait(1e-4)
            counted += 1
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert counted > 5


# ---- Fork --------------------------------------------------------------------------------------

FORK = """
import os, sys, threading, torch
from torch.utils.data import DataLoader, Dataset
sys.path.insert(0, TESTS)
import test_threads as tests

torch.set_num_threads(THREADS)
names = ("snf_conv2d", "snf_linear", "rq_spline", "image_network", "triangular_conv2d_solve",
         "affine_coupling", "debias_conv2d")
cases = {name: tests.operators()[name] for name in names}
before = {name: tests.step(name, case) for name, case in cases.items()}

def agrees():
    return all(tests.close(tests.step(name, case), before[name]) for name, case in cases.items())

class Images(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return tests.step("affine_coupling", cases["affine_coupling"])[0][i], agrees()

# Workers, while the parent goes on.
loader = DataLoader(Images(), batch_size=2, num_workers=2, multiprocessing_context="fork")
for images, right in loader:
    assert right.all() and images.shape == (2, 8, 7, 9)
    assert agrees()

# A child of a process whose other threads are inside operators, pool and all. It may not use
# OpenMP, which does not outlive a fork from another thread than the one that started it.
stop = threading.Event()
large = torch.randn(16, 8, 16, 16), torch.randn(8, 8, 3, 3)
def busy():
    while not stop.is_set():
        torch.ops.snf_ext.snf_conv2d(large[0], large[1], large[1], None)
others = [threading.Thread(target=busy) for _ in range(2)]
for other in others:
    other.start()
for turn in range(4):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        z = torch.ops.snf_ext.snf_conv2d(large[0], large[1], large[1], None)[0]
        os._exit(0 if z.shape == large[0].shape and agrees() else 1)
    assert os.waitpid(pid, 0)[1] == 0, turn
stop.set()
for other in others:
    other.join()
print("done")
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 3])
def test_fork(threads, tmp_path):
    """Ran in the parent, an operator runs in DataLoader's workers and in a child; none waits."""
    script = tmp_path / "script.py"
    head = f"TESTS, THREADS = {os.path.dirname(os.path.abspath(__file__))!r}, {threads}\n"
    script.write_text(head + FORK)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")
