"Every network of the zoo: shapes, halves, taps, counts; the structure of four of them, pinned."
import copy
import inspect
import math
import re

import pytest
import torch
from torch import nn

from medkd.core import Tapped, tap_shapes
from medkd.models.base import EncoderDecoder
from medkd.models.fanet import FANet
from medkd.models.profile import count, latency, on_meta, peak_memory, thop_layers
from medkd.models.zoo import MODELS, build, model_options

PAIRED = ("fanet", "mobile_unet", "enet", "erfnet")
PROFILED = ("fanet", "enet", "lcovnet")


@pytest.fixture(params=sorted(MODELS))
def name(request): return request.param


@pytest.fixture
def size(name):
    "Small, not square, and what the network takes."
    net = MODELS[name]
    least = max(net.multiple, net.minimum, 16)
    return (32, 64) if net.ndim == 2 else (least, least, least + net.multiple)


@pytest.fixture
def net(name):
    torch.manual_seed(0)
    return build(name, width=.25).eval()


@pytest.fixture
def image(size): return torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))


def total(net): return sum(p.numel() for p in net.parameters())


def meta(name, *args, **options):
    with torch.device("meta"): return build(name, *args, **options)


# shapes and errors

@pytest.mark.parametrize("width", (.25, .5))
def test_output_has_the_size_of_the_input(name, size, width):
    net = build(name, in_channels=3, num_classes=5, width=width).eval()
    with torch.no_grad(): assert net(torch.rand(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("axis", (0, -1))
def test_a_size_that_does_not_divide_is_refused(net, size, axis):
    size = list(size)
    size[axis] = 52 if net.multiple > 4 else 7
    with pytest.raises(ValueError, match=re.escape(str(tuple(size)))) as error:
        net(torch.rand(1, 1, *size))
    expected = f"multiples of {net.multiple}" if net.multiple > 4 else "at least 8"
    assert expected in str(error.value)


def test_every_multiple_is_enough(net):
    least = max(net.multiple, net.minimum)
    size = (*[least] * (net.ndim - 1), 2 * least) if net.multiple > 1 else (23, 40)
    with torch.no_grad(): assert net(torch.rand(1, 1, *size)).shape[2:] == size


@pytest.mark.parametrize("front", ((1, 2), (1,), (1, 1, 32)))
def test_another_shape_is_refused(net, size, front):
    with pytest.raises(ValueError, match=rf"takes \(batch, 1 channels, {net.ndim} sizes\)"):
        net(torch.rand(*front, *size))


def test_a_size_below_the_smallest_is_refused(net, size):
    if net.minimum <= net.multiple: return
    with pytest.raises(ValueError, match=f"at least {net.minimum}"):
        net(torch.rand(1, 1, *size[1:], net.minimum - net.multiple))


@pytest.mark.parametrize("argument, value", (
    ("width", 0), ("width", math.inf), ("num_classes", 0), ("num_classes", 2.), ("in_channels", 0)))
def test_numbers_that_cannot_be_are_refused(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"): build(name, **{argument: value})


def test_unknown_options_name_the_known(name):
    with pytest.raises(TypeError, match="no option 'depth'") as error: build(name, depth=3)
    assert all(option in str(error.value) for option in model_options(name))


def test_unknown_network_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean mobile_unet"): build("mobileunet")


def test_width_one_is_the_published_network(name):
    assert inspect.signature(MODELS[name]).parameters["width"].default == 1
    sizes = [total(meta(name, width=width)) for width in (1, .5, .25)]
    assert sizes[0] > sizes[1]
    assert sizes[1] > sizes[2] or name == "segresnet" # MONAI's has at least 8 filters


def test_seed_decides_the_weights(name):
    def weights():
        return torch.cat([p.detach().flatten() for p in build(name, width=.25).parameters()])
    torch.manual_seed(3)
    first = weights()
    torch.manual_seed(3)
    assert torch.equal(first, weights())


# the two halves

@torch.no_grad()
def test_forward_is_decode_of_encode(net, image):
    features = net.encode(image)
    assert torch.equal(net.decode(features), net(image))
    assert isinstance(net, EncoderDecoder) and "bottleneck" in features


@torch.no_grad()
def test_bottleneck_may_be_replaced(net, image):
    features = net.encode(image)
    other = features | dict(bottleneck=torch.zeros_like(features["bottleneck"]))
    assert not torch.equal(net.decode(other), net(image))
    assert torch.equal(net.decode(net.encode(image.flip(0)) | features), net(image))


@pytest.mark.parametrize("index", (slice(1, 3), [2, 0], torch.tensor([True, False, True])),
                         ids=("slice", "list", "mask"))
@torch.no_grad()
def test_features_may_be_indexed_along_the_batch(net, image, index):
    part = {k: v[index] for k, v in net.encode(image).items()}
    torch.testing.assert_close(net.decode(part), net(image)[index], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_a_replaced_bottleneck(net, image):
    features = net.encode(image)
    other = features["bottleneck"].detach().requires_grad_()
    net.decode(features | dict(bottleneck=other)).square().mean().backward()
    assert other.grad.abs().sum() > 0


def test_gradient_reaches_every_parameter(net, image):
    (net(image) * torch.randn(3, 2, *image.shape[2:])).sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_training_lowers_the_loss(name, image):
    torch.manual_seed(0)
    net, label = build(name, width=.25), (image[:, 0] > .5).long()
    optimiser, losses = torch.optim.AdamW(net.parameters(), 1e-3), []
    for _ in range(6):
        losses.append(nn.functional.cross_entropy(net(image), label))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert min(losses[-2:]) < losses[0]


@torch.no_grad()
def test_state_travels(name, net, image):
    other = build(name, width=.25).eval()
    assert not torch.equal(other(image), net(image))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(image), net(image))


@torch.no_grad()
def test_channels_last_and_bfloat16_run(net, image):
    out = net(image)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    net = net.to(memory_format=formats[net.ndim])
    torch.testing.assert_close(net(image), out, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16): assert net(image).isfinite().all()


def test_eval_returns_the_network(net): assert net.eval() is net and net.train() is net


def test_fanet_cannot_train_on_one_sample():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        FANet(width=.25)(torch.rand(1, 1, 16, 16))


# taps

SHAPES = dict( # role -> channels, size at 256x256 or 96x96x96
    fanet=dict(encoder=(256, 64), decoder=(256, 64), head_in=(64, 256),
               e1=(64, 256), e2=(128, 128), e3=(256, 64), e4=(512, 32),
               d4=(256, 64), d3=(128, 128), d2=(64, 256)),
    mobile_unet=dict(encoder=(24, 64), decoder=(24, 64), head_in=(16, 128),
                     e1=(16, 128), e2=(24, 64), e3=(32, 32), e4=(96, 16), e5=(1280, 8),
                     d5=(96, 16), d4=(32, 32), d3=(24, 64), d2=(16, 128)),
    enet=dict(encoder=(64, 64), decoder=(64, 64), head_in=(16, 128),
              e1=(16, 128), e2=(64, 64), e3=(128, 32), e4=(128, 32), d3=(64, 64), d2=(16, 128),
              low=(16, 128), high=(128, 32)),
    erfnet=dict(encoder=(64, 64), decoder=(64, 64), head_in=(16, 128),
                e1=(16, 128), e2=(64, 64), e3=(128, 32), d3=(64, 64), d2=(16, 128)),
    unet=dict(encoder=(256, 64), decoder=(256, 64), head_in=(64, 256),
              e1=(64, 256), e2=(128, 128), e3=(256, 64), e4=(512, 32), e5=(1024, 16),
              d5=(512, 32), d4=(256, 64), d3=(128, 128), d2=(64, 256),
              low=(128, 128), high=(1024, 16)),
    unet_plus_plus=dict(encoder=(256, 64), decoder=(256, 64), head_in=(64, 256),
                        e1=(128, 128), e2=(256, 64), e3=(128, 128), e4=(512, 32), e5=(1024, 16),
                        d5=(64, 256), d4=(64, 256), d3=(64, 256), d2=(128, 128),
                        low=(128, 128), high=(512, 32)),
    resnet18=dict(encoder=(64, 64), decoder=(64, 256), head_in=(512, 8),
                  e1=(64, 128), e2=(64, 64), e3=(128, 32), e4=(256, 16), e5=(512, 8),
                  d5=(256, 256), d4=(128, 256), d3=(64, 256), d2=(64, 256),
                  low=(64, 128), high=(128, 32)),
    unet_resnet18=dict(encoder=(64, 64), decoder=(64, 64), head_in=(32, 128),
                       e1=(64, 128), e2=(64, 64), e3=(128, 32), e4=(256, 16), e5=(512, 8),
                       d5=(256, 16), d4=(128, 32), d3=(64, 64), d2=(32, 128)),
    raunet=dict(encoder=(64, 64), decoder=(64, 64), head_in=(64, 128),
                e1=(64, 128), e2=(64, 64), e3=(128, 32), e4=(256, 16), e5=(512, 8),
                d5=(256, 16), d4=(128, 32), d3=(64, 64), d2=(64, 128),
                low=(64, 128), high=(128, 32)),
    unet3d_tiny=dict(encoder=(64, 24), decoder=(32, 48), head_in=(64, 48), e1=(32, 48),
                     e2=(64, 24), e3=(128, 12), e4=(256, 12), d3=(64, 24), d2=(32, 48)),
    resunet3d=dict(encoder=(128, 24), decoder=(64, 48), head_in=(128, 48), e1=(64, 48),
                   e2=(128, 24), e3=(256, 12), e4=(512, 12), d3=(128, 24), d2=(64, 48),
                   branch=(64, 48), as_published=(64, 48)),
    segresnet=dict(encoder=(64, 24), decoder=(16, 96), head_in=(16, 96), e1=(16, 96),
                   e2=(32, 48), e3=(64, 24), e4=(128, 12), d4=(64, 24), d3=(32, 48), d2=(16, 96),
                   branch=(16, 96), as_published=(16, 96)),
    espnetv2_3d=dict(encoder=(64, 24), decoder=(32, 48), head_in=(32, 48), e1=(32, 48),
                     e2=(64, 24), e3=(128, 12), e4=(256, 6), d4=(64, 12), d3=(48, 24), d2=(32, 48)),
    mobile_unet3d=dict(encoder=(24, 24), decoder=(16, 96), head_in=(16, 96), e1=(16, 48),
                       e2=(24, 24), e3=(32, 12), e4=(96, 6), e5=(1280, 3),
                       d5=(96, 6), d4=(32, 12), d3=(24, 24), d2=(16, 48)),
    lcovnet=dict(encoder=(64, 24), decoder=(16, 96), head_in=(16, 96), e1=(16, 96), e2=(32, 48),
                 e3=(64, 24), e4=(128, 12), e5=(256, 6),
                 d5=(128, 12), d4=(64, 24), d3=(32, 48), d2=(16, 96)),
)
SHAPES["unet_noskip"] = SHAPES["unet"]


def test_tap_shapes(name):
    ndim, full = MODELS[name].ndim, {2: 256, 3: 96}[MODELS[name].ndim]
    with torch.device("meta"): shapes = tap_shapes(build(name), (1, 1, *[full] * ndim))
    assert shapes.pop("out") == (1, 2, *[full] * ndim)
    assert shapes == {role: (1, c, *[s] * ndim) for role, (c, s) in SHAPES[name].items()}


def test_canonical_names(net, image):
    names = [n for n, _ in net.named_children()]
    encoder, decoder = ([n for n in names if n.startswith(kind)] for kind in ("enc", "dec"))
    assert encoder == [f"enc{i + 1}" for i in range(len(encoder))] and "bottleneck" in names
    assert decoder == [f"dec{i}" for i in range(len(decoder), 0, -1)] and names[-1] == "head"
    features = net.encode(image)
    assert [k for k in features if k in names] == [*encoder, "bottleneck"]


def test_roles_are_what_flows(name, net, image, size):
    taps = Tapped(net, [*net.taps, "head"])(image)
    assert torch.equal(taps["head"], taps["out"])
    assert taps["encoder"].shape[2:] == tuple(s // 4 for s in size)
    if name in PAIRED: assert taps["decoder"].shape[2:] == taps["encoder"].shape[2:]
    for role, target in net.taps.items():
        if target in taps.features: assert taps[role] is taps.features[target]


@pytest.mark.parametrize("training", (False, True))
def test_no_tap_is_rewritten_in_place(net, image, training):
    seen = {}
    def keep(name):
        def hook(module, args, out): seen[name] = out, out._version, out.detach().clone()
        return hook
    names = {n for n, _ in net.named_children()} | {t for t in net.taps.values() if ":" not in t}
    for n in names - {"pool"}: net.get_submodule(n).register_forward_hook(keep(n))
    net.train(training)(image).sum().backward()
    assert seen.keys() == names - {"pool"}
    for out, version, value in seen.values():
        assert out._version == version and torch.equal(out, value)


# counts

# by the rules of thop: parameters, operations, those of convolutions, normalisation and pooling,
# operations at 224x224; last, the true multiply-accumulates in 1e9
TABLE = {
    "fanet": (38_249_668, 171_556_440_064, 171_497_137_024, 0, 59_303_040, 131_375_680_192,
              166.597),
    "mobile_unet": (4_639_811, 1_491_501_056, 1_491_501_056, 0, 0, 1_141_930_496, .9625),
    "enet": (348_996, 516_145_152, 500_350_976, 15_794_176, 0, 395_173_632, .4610),
    "erfnet": (2_062_872, 3_680_993_280, 3_665_002_496, 15_990_784, 0, 2_818_260_480, 3.3042),
}


def dead_head(name, size):
    """(parameters, operations, multiply-accumulates) of FANet's second head, which is in the
    published numbers and not in the network."""
    if name != "fanet": return 0, 0, 0
    return 64 * 2 + 2, (64 + 1) * 2 * size**2, 64 * 2 * size**2


@pytest.mark.parametrize("name", PAIRED)
def test_published_table(name):
    net, norm, shape = meta(name), name in ("enet", "erfnet"), (1, 1, 256, 256)
    params, operations, convs, norms, pools, at_224, gmacs = TABLE[name]
    dead = dead_head(name, 256)
    assert count(net, shape, "thop", norm) == (params - dead[0], operations - dead[1])
    assert count(net, (1, 1, 224, 224), "thop", norm)[1] == at_224 - dead_head(name, 224)[1]
    decimals = 3 if name == "fanet" else 4
    assert round((count(net, shape)[1] + dead[2]) / 1e9, decimals) == gmacs
    parts = {}
    for layer, n in thop_layers(*on_meta(net, shape), norm).items():
        kind = re.search("Conv|BatchNorm|Pool|PReLU", type(layer).__name__)[0]
        parts[kind] = parts.get(kind, 0) + n
    found = tuple(parts.get(kind, 0) for kind in ("Conv", "BatchNorm", "Pool"))
    assert found == (convs - dead[1], norms, pools)


def test_dead_head_of_the_published_fanet(): assert dead_head("fanet", 256)[:2] == (130, 8_519_680)


@pytest.mark.parametrize("name, params, per_class, per_channel", (
    ("fanet", 38_292_162, 65, 128), ("mobile_unet", 4_682_323, 4, 288),
    ("enet", 348_996, 144, None), ("erfnet", 2_062_872, 65, None), ("unet", 34_525_954, 65, 576),
    ("unet_noskip", 31_392_514, 65, 576)))
def test_parameters(name, params, per_class, per_channel):
    assert total(meta(name)) == params
    assert total(meta(name, 1, 3)) == params + per_class
    if per_channel: assert total(meta(name, 3)) == params + 2 * per_channel


def test_parameters_with_three_channels():
    assert total(meta("enet", 3)) == 349_212 and total(meta("enet", 3, 12)) == 350_652
    assert total(meta("erfnet", 3)) == 2_063_344 - 258


def test_mobile_unet_squeezes_up_to_three_classes():
    assert [len(meta("mobile_unet", 1, k).head) for k in (2, 3, 4, 9)] == [3, 3, 2, 2]
    assert len(meta("mobile_unet", 1, 9, squeeze=True).head) == 3
    assert len(meta("mobile_unet", squeeze=False).head) == 2


@pytest.mark.parametrize("layer, ndim, transposed", (
    (nn.Conv2d, 2, False), (nn.ConvTranspose2d, 2, True),
    (nn.Conv3d, 3, False), (nn.ConvTranspose3d, 3, True)))
def test_one_layer(layer, ndim, transposed):
    net, shape = layer(4, 8, 2, stride=2, bias=False), (2, 4, *[8] * ndim)
    steps = 8**ndim if transposed else 4**ndim
    assert count(net, shape) == (32 * 2**ndim, 2 * steps * 32 * 2**ndim)
    assert count(net, shape, "thop")[1] == count(net, shape)[1] * (2**ndim if transposed else 1)


def test_linear_layers_count_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    assert count(net, (2, 3, 2, 2)) == (65, 120) and count(net, (2, 3, 2, 2), "thop") == (65, 120)


@pytest.mark.parametrize("name", PROFILED)
def test_count_leaves_the_network_alone(net, image):
    calls = []
    handle = net.head.register_forward_hook(lambda *args: calls.append(1))
    net.train().enc1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    count(net, image.shape), count(net, image.shape, "thop"), peak_memory(net, image.shape)
    assert not calls and torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert sum(len(m._forward_hooks) for m in net.modules()) == 1
    handle.remove()


@pytest.mark.parametrize("name", PROFILED)
def test_latency_and_peak_memory(net, size):
    assert latency(net, (1, 1, *size), repeats=2) > 0
    one, four = (peak_memory(net, (batch, 1, *size)) for batch in (1, 4))
    assert 4 * (total(net) + math.prod(size)) < one < four


# structure: logits and taps of fixed weights, whatever the order of the modules

# logits: mean, standard deviation, first, last, largest magnitude;
# each tap: channels, mean, standard deviation, first
PINS = {
    "mobile_unet": ((-1.32603524, 2.46078347, 1.55100412, -.117645698, 10.2215119),
                    (24, .168773714, 1.72042101, -1.38642217),
                    (24, .672818152, 2.49314362, .508089862)),
    "enet": ((-71564.8669, 1112390.47, -6745.8507, -905896.677, 6063325.55),
             (64, 15.7111199, 19.8079361, .79821933), (64, 892691.008, 1005639.15, 61925.4538)),
    "erfnet": ((-2689.91685, 2906.2522, -2186.07171, -338.413219, 9845.23759),
               (64, .400644589, .570155866, .236610546), (64, 269.822379, 354.885581, 527.845164)),
    "fanet": ((-9091.93815, 35274.2535, -2867.23126, 6624.48558, 104380.662),
              (256, 5.8167676, 8.11478336, 0), (256, -.883842561, 14.2693041, -2.3706807)),
}


def fill(tensor, fan):
    s = torch.sin(12.9898 * torch.arange(1, tensor.numel() + 1, dtype=torch.float64)) * 43758.5453
    tensor.data = ((2 * (s - s.floor()) - 1) * math.sqrt(6 / fan)).view_as(tensor)


def pinned(net):
    "`net` in float64 with weights from a formula."
    for m in net.double().eval().modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            fill(m.weight, m.in_channels // m.groups * math.prod(m.kernel_size))
            if m.bias is not None: m.bias.data = .01 * torch.arange(m.bias.numel()).double().cos()
        if isinstance(m, nn.BatchNorm2d): m.reset_parameters()
    return net


def moments(t):
    flat = t.flatten()
    return [v.item() for v in (t.mean(), t.std(correction=0), flat[0], flat[-1], t.abs().max())]


@pytest.mark.parametrize("name", PAIRED)
@torch.no_grad()
def test_structure(name):
    x = (torch.sin(.37 * torch.arange(128 * 128, dtype=torch.float64)) + .1).view(1, 1, 128, 128)
    taps = Tapped(pinned(build(name)), ["encoder", "decoder"])(x)
    logits, *features = PINS[name]
    assert taps["out"].shape == (1, 2, 128, 128)
    assert moments(taps["out"]) == pytest.approx(logits, rel=0, abs=1e-6 * logits[-1])
    for role, (channels, *values) in zip(("encoder", "decoder"), features):
        assert taps[role].shape == (1, channels, 32, 32)
        *got, _, largest = moments(taps[role])
        assert got == pytest.approx(values, rel=0, abs=1e-6 * largest)
