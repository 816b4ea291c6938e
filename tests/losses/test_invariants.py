"""What must hold for every loss on any input, whatever its formula."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LOSSES,
    SET_LOSSES,
    TOKEN_LOSSES,
    assert_near,
    example,
    fused,
    random_weights,
    value_and_grad,
)
from hypothesis import given
from hypothesis import strategies as st

import segloss

seeds = st.integers(0, 2**31 - 1)
tokens = st.integers(1, 12)
vocabularies = st.integers(2, 20)
skills = st.sampled_from([0.0, 2.0, 8.0])

VARIANTS = [(name, {}) for name in LOSSES]
VARIANTS += [("cross_entropy", {"label_smoothing": 0.2, "z_loss": 0.01})]
VARIANTS += [(name, {"classes": "all"}) for name in SET_LOSSES]
VARIANTS += [("dice_loss", {"average": "micro"}), ("tversky_loss", {"average": "micro"})]
each_variant = pytest.mark.parametrize("name, options", VARIANTS, ids=str)


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, skill=skills)
def test_order_of_the_tokens_is_irrelevant(name, options, seed, n, v, skill):
    logits, target = example(n, v, seed=seed, skill=skill)
    weight = random_weights(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value, grad = value_and_grad(fused(name), logits, target, token_weight=weight, **options)
    shuffled = value_and_grad(
        fused(name), logits[order], target[order], token_weight=weight[order], **options
    )
    assert_near(shuffled[0], value)
    assert_near(shuffled[1], grad[order])


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, skill=skills)
def test_names_of_the_classes_are_irrelevant(name, options, seed, n, v, skill):
    logits, target = example(n, v, seed=seed, skill=skill)
    weight = random_weights(v, seed=seed)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    renamed = torch.where(target == -100, -100, order.argsort()[target.clamp(min=0)])
    value, grad = value_and_grad(fused(name), logits, target, weight=weight, **options)
    permuted = value_and_grad(
        fused(name), logits[:, order], renamed, weight=weight[order], **options
    )
    assert_near(permuted[0], value)
    assert_near(permuted[1], grad[:, order])


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, pad=st.integers(1, 9))
def test_padding_the_vocabulary_changes_nothing(name, options, seed, n, v, pad):
    logits, target = example(n, v, seed=seed)
    value, grad = value_and_grad(fused(name), logits, target, **options)
    wide = F.pad(logits, (0, pad), value=-torch.inf)
    padded = value_and_grad(fused(name), wide, target, **options)
    assert_near(padded[0], value)
    assert_near(padded[1][:, :v], grad)
    assert (padded[1][:, v:] == 0).all()


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, more=st.integers(1, 5))
def test_appended_ignored_rows_change_nothing(name, options, seed, n, v, more):
    logits, target = example(n, v, seed=seed)
    value, grad = value_and_grad(fused(name), logits, target, **options)
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, 0.0]).double()[:more]
    longer = torch.cat([logits, junk[:, None].expand(more, v)])
    appended = value_and_grad(fused(name), longer, F.pad(target, (0, more), value=-100), **options)
    assert_near(appended[0], value, 1e-14)
    assert_near(appended[1][:n], grad, 1e-14)
    assert (appended[1][n:] == 0).all()


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, skill=skills)
def test_weight_two_is_a_token_listed_twice(name, options, seed, n, v, skill):
    logits, target = example(n, v, seed=seed, skill=skill)
    times = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))
    weighted = value_and_grad(fused(name), logits, target, token_weight=times.double(), **options)
    row = torch.arange(n).repeat_interleave(times)
    listed = value_and_grad(fused(name), logits[row], target[row], **options)
    assert_near(weighted[0], listed[0])
    assert_near(weighted[1], torch.zeros_like(logits).index_add(0, row, listed[1]))


@pytest.mark.parametrize("name", SET_LOSSES)
@given(seed=seeds, v=vocabularies)
def test_weight_two_is_a_token_listed_twice_in_each_sample(name, seed, v):
    logits, target = example(10, v, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 4, (10,), generator=draw)
    ids = torch.randint(0, 3, (10,), generator=draw)
    weighted = value_and_grad(
        fused(name), logits, target, token_weight=times.double(), per_sample=True, sample_ids=ids
    )
    row = torch.arange(10).repeat_interleave(times)
    listed = value_and_grad(
        fused(name), logits[row], target[row], per_sample=True, sample_ids=ids[row]
    )
    assert_near(weighted[0], listed[0])
    assert_near(weighted[1], torch.zeros_like(logits).index_add(0, row, listed[1]))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@given(seed=seeds, v=vocabularies)
def test_normalizer_makes_four_batches_one(name, seed, v):
    logits, target = example(4, 5, v, seed=seed)
    class_weight, token_weight = random_weights(v, seed=seed), random_weights(4, 5, seed=seed)
    options = {"weight": class_weight}
    whole = value_and_grad(fused(name), logits, target, token_weight=token_weight, **options)
    valid = target != -100
    total = (token_weight * class_weight[target.clamp(min=0)])[valid].sum().item()

    def accumulated(z, _):
        return sum(
            fused(name)(z[i], target[i], token_weight=token_weight[i], normalizer=total, **options)
            for i in range(4)
        )

    value, grad = value_and_grad(accumulated, logits, target)
    assert_near(value, whole[0])
    assert_near(grad, whole[1])


@pytest.mark.parametrize("name", SET_LOSSES)
@given(seed=seeds, v=vocabularies)
def test_normalizer_weighs_a_region_loss_by_its_share(name, seed, v):
    logits, target = example(9, v, seed=seed)
    weight = random_weights(9, seed=seed)
    value, grad = value_and_grad(fused(name), logits, target, token_weight=weight)
    share = weight[target != -100].sum() / 50
    scaled = value_and_grad(fused(name), logits, target, token_weight=weight, normalizer=50)
    assert_near(scaled[0], share * value)
    assert_near(scaled[1], share * grad)


@each_variant
@given(seed=seeds, n=tokens, v=vocabularies, shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(name, options, seed, n, v, shift):
    if options.get("z_loss"):
        options = {"label_smoothing": 0.2}  # the z-loss exists to see such a constant
    logits, target = example(n, v, seed=seed)
    shifts = shift * torch.arange(n)[:, None] / n
    value, grad = value_and_grad(fused(name), logits, target, **options)
    shifted = value_and_grad(fused(name), logits + shifts, target, **options)
    assert_near(shifted[0], value)
    assert_near(shifted[1], grad)


@given(seed=seeds, n=tokens, v=vocabularies)
def test_combined_is_the_sum_of_its_parts(seed, n, v):
    logits, target = example(n, v, seed=seed)
    a, b, c = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    combined = (
        a * segloss.CrossEntropyLoss() + b * segloss.TverskyLoss() + c * segloss.LovaszSoftmaxLoss()
    )
    value, grad = value_and_grad(combined, logits, target)

    def apart(z, y):
        return (
            a * segloss.cross_entropy(z, y)
            + b * segloss.tversky_loss(z, y)
            + c * segloss.lovasz_softmax(z, y)
        )

    parts = value_and_grad(apart, logits, target)
    assert_near(value, parts[0])
    assert_near(grad, parts[1])


@given(seed=seeds, n=tokens, v=vocabularies)
def test_focal_without_focus_is_cross_entropy(seed, n, v):
    logits, target = example(n, v, seed=seed)
    focal = value_and_grad(segloss.focal_loss, logits, target, gamma=0.0)
    plain = value_and_grad(F.cross_entropy, logits, target)
    assert_near(focal[0], plain[0])
    assert_near(focal[1], plain[1])
