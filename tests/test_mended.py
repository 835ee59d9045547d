"""What is mended of TorchRL's losses, beside their numbers: copies, modes, states, batches, arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from tensordict import TensorDict
from torchrl import objectives

from torchrl_iql import AWACLoss, OfflineDataset, TrainStep, models
from torchrl_iql.objectives import BCLoss, CQLLoss, DTLoss, TD3BCLoss

D, A, B = 3, 2, 6
SMALL: dict[str, Any] = {"hidden_sizes": (8, 8)}
BOUNDS = -torch.ones(A), torch.ones(A)


def td3bc(**settings: Any) -> Any:
    policy = models.deterministic_policy(D, A, **SMALL, dropout=settings.pop("dropout", 0.0))
    return TD3BCLoss(policy, models.qvalue_network(D, A, **SMALL), bounds=BOUNDS, **settings)


def cql(**settings: Any) -> Any:
    policy = models.heteroscedastic_policy(D, A, **SMALL, dropout=settings.pop("dropout", 0.0))
    return CQLLoss(policy, models.qvalue_network(D, A, **SMALL), bounds=BOUNDS, **settings)


BOTH = pytest.mark.parametrize("make", [td3bc, cql])


def batch(seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    terminated = torch.zeros(B, 1, dtype=torch.bool)
    terminated[1] = True
    after = {"observation": normal(B, D), "reward": normal(B, 1), "terminated": terminated}
    next_ = TensorDict({**after, "done": terminated.clone()}, [B])
    data = {"observation": normal(B, D), "action": normal(B, A).clamp(-0.9, 0.9), "next": next_}
    return TensorDict(data, [B])


def losses(loss: Any, td: TensorDict, seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {key: value.detach().clone() for key, value in loss(td).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@BOTH
@pytest.mark.parametrize("by", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_that_was_called_goes_up_its_own_q(
    make: Callable[..., Any], by: Callable[[Any], Any]
) -> None:
    loss = make()
    before = losses(loss, batch())
    copied = by(loss)
    assert_same(losses(copied, batch()), before)
    for parameter in copied.qvalue_network_params.values(True, True):
        parameter.data.mul_(3)
    fresh = make()
    fresh.load_state_dict(copied.state_dict())
    assert_same(losses(copied, batch()), losses(fresh, batch()))
    assert_same(losses(loss, batch()), before)


@pytest.mark.parametrize("make", [td3bc, cql, "sac"])
def test_a_copy_of_a_loss_is_trained_as_one_made_anew(make: Any) -> None:
    """Of TorchRL's own, too: a training step drops what they cache."""

    def sac() -> Any:
        policy = models.heteroscedastic_policy(D, A, **SMALL)
        q = models.qvalue_network(D, A, **SMALL)
        loss = objectives.SACLoss(policy, q, target_entropy=-2.0)
        loss.make_value_estimator(gamma=0.99)
        return loss

    make = sac if make == "sac" else make
    used = make()
    used(batch())
    copied, fresh = copy.deepcopy(used), make()
    fresh(batch())
    fresh.load_state_dict(used.state_dict())
    states = []
    for loss in (copied, fresh):
        step = TrainStep(loss, learning_rate=1e-2, seeds=3)
        for seed in range(5):
            step(batch(seed))
        states.append(loss.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@BOTH
def test_eval_reaches_the_networks(make: Callable[..., Any]) -> None:
    loss = make(dropout=0.5)
    for mode, agree in (("eval", True), ("train", False)):
        getattr(loss, mode)()
        entries = [
            loss.actor_network(batch().select("observation"))["action" if make is td3bc else "loc"]
            for _ in range(2)
        ]
        assert torch.equal(*entries) == agree, mode


def test_eval_reaches_a_policy_that_is_cloned() -> None:
    loss = BCLoss(models.gaussian_policy(D, A, **SMALL, dropout=0.5))
    for mode, agree in (("eval", True), ("train", False)):
        getattr(loss, mode)()
        assert torch.equal(*(loss(batch())["loss_bc"] for _ in range(2))) == agree


@BOTH
def test_a_state_is_the_same_before_and_after_the_first_call(make: Callable[..., Any]) -> None:
    loss = make()
    before = set(loss.state_dict())
    loss(batch())
    assert set(loss.state_dict()) == before
    theirs = {k: v for k, v in loss.state_dict().items() if not k.startswith("_value_estimator")}
    make().load_state_dict(theirs)  # of TorchRL's, before its first call
    assert make().make_value_estimator(gamma=0.5).value_estimator.gamma == 0.5


@BOTH
def test_nan_after_a_termination_is_not_read_and_a_batch_may_be_locked(
    make: Callable[..., Any],
) -> None:
    loss, td = make(), batch()
    expected = losses(loss, td.clone())
    td["next", "observation"][1] = torch.nan
    found = losses(loss, td.clone())
    for key, value in found.items():
        assert value.isfinite().all(), key
    differ = {"loss_cql", "qvalue"}  # its penalty asks pi(s') for actions, also there
    for key in found.keys() - differ - {"next_state_value"}:
        assert torch.equal(found[key], expected[key]), key
    td["next", "observation"][2] = torch.nan  # where it goes on
    try:
        assert not losses(loss, td.clone())["loss_qvalue"].isfinite()
    except (RuntimeError, ValueError) as error:
        assert "nan" in str(error).lower() or "std" in str(error)
    locked, plain = batch().lock_(), batch()
    assert_same(losses(loss, locked), losses(loss, plain))
    assert "td_error" in plain.keys() and "td_error" not in locked.keys()


@BOTH
@pytest.mark.parametrize("key", ["observation", "action", ("next", "reward"), ("next", "done")])
def test_an_entry_that_is_missing_is_named(make: Callable[..., Any], key: Any) -> None:
    with pytest.raises(KeyError, match=str(key).strip("()").replace("'", ".")):
        make()(batch().exclude(key))


@BOTH
def test_networks_that_observe_otherwise_are_refused(make: Callable[..., Any]) -> None:
    loss, td = make(), batch()
    loss.qvalue_network.in_keys = ["privileged", "action"]
    td["privileged"] = td["observation"]
    with pytest.raises(ValueError, match="qvalue_network reads 'privileged', which is no input of"):
        loss(td)


def test_importance_weights_may_have_a_column() -> None:
    loss, td = td3bc(), batch()
    td["priority_weight"] = torch.rand(B)
    column = td.clone().set("priority_weight", td["priority_weight"].unsqueeze(-1))
    assert_same(losses(loss, td), losses(loss, column))


@BOTH
def test_the_first_q_network_is_the_given_one(make: Callable[..., Any]) -> None:
    q = models.qvalue_network(D, A, **SMALL)
    policy = models.deterministic_policy if make is td3bc else models.heteroscedastic_policy
    of = TD3BCLoss if make is td3bc else CQLLoss
    loss = of(policy(D, A, **SMALL), q, bounds=BOUNDS)
    for name, parameter in q.named_parameters():
        stacked = loss.qvalue_network_params.get(tuple(name.split(".")))
        assert torch.equal(stacked[0], parameter)
        assert not torch.equal(stacked[1], parameter) or not parameter.any()
        if parameter.ndim == 2:  # of the same kind: orthogonal
            singular = [torch.linalg.svdvals(each) for each in (parameter, stacked[1])]
            torch.testing.assert_close(*singular)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (td3bc, {"alpha": -1.0}),
        (td3bc, {"alpha": float("nan")}),
        (td3bc, {"policy_noise": -1.0}),
        (td3bc, {"noise_clip": float("nan")}),
        (td3bc, {"num_qvalue_nets": 0}),
        (cql, {"min_q_weight": -1.0}),
        (cql, {"temperature": 0.0}),
        (cql, {"lagrange_thresh": float("nan")}),
        (cql, {"num_random": 0}),
        *((make, {"reduction": "avg"}) for make in (td3bc, cql)),
        *((make, {"loss_function": "l3"}) for make in (td3bc, cql)),
    ],
)
def test_what_can_not_be_is_refused(make: Callable[..., Any], change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        make(**change)


@BOTH
def test_a_discount_and_a_policy_that_can_not_be_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 2"):
        make().make_value_estimator(gamma=2.0)
    policies = [models.deterministic_policy(D, A), models.gaussian_policy(D, A)]
    of, policy = (TD3BCLoss, policies[1]) if make is td3bc else (CQLLoss, policies[0])
    with pytest.raises(TypeError, match=r"actor_network (has a distribution|is deterministic)"):
        of(policy, models.qvalue_network(D, A), bounds=BOUNDS)  # pyright: ignore


def test_bounds_of_one_number_are_not_those_of_cql() -> None:
    networks = models.heteroscedastic_policy(D, A), models.qvalue_network(D, A)
    with pytest.raises(ValueError, match=r"bounds must be of each dimension of actions, \[A\]"):
        CQLLoss(*networks, bounds=(-1.0, 1.0))  # pyright: ignore


@pytest.mark.parametrize("lagrange", [False, True])
@pytest.mark.parametrize("mode", ["exclude", "non_tensor"])
def test_cql_is_not_reduced_if_it_is_not_to_be(mode: str, lagrange: bool) -> None:
    its = {"with_lagrange": lagrange, "lagrange_thresh": 1.0}
    loss, whole = cql(**its), cql(**its, reduction="none", scalar_output_mode=mode)
    whole.load_state_dict(loss.state_dict())
    td = batch()
    torch.manual_seed(5)
    expected = loss(td.clone())
    torch.manual_seed(5)
    found = whole(td.clone())
    assert set(found.keys()) == set(whole.out_keys)
    assert ("alpha" in found.keys()) == (mode == "non_tensor")
    assert ("loss_alpha_prime" in found.keys()) == lagrange
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == (B,) or key in ("alpha", "entropy")
            torch.testing.assert_close(value.mean(), expected[key])
    named = {"_".join(k) if isinstance(k, tuple) else k: td[k] for k in whole.in_keys}
    torch.manual_seed(5)
    for key, value in zip(whole.out_keys, whole(**named), strict=True):
        if key.startswith("loss_"):
            torch.testing.assert_close(value, found[key])


@BOTH
def test_what_a_mask_leaves_out_changes_no_scalar(make: Callable[..., Any]) -> None:
    loss, td = make(), batch()
    mask = torch.ones(B, dtype=torch.bool)
    mask[3:] = False
    td["collector"] = TensorDict({"mask": mask}, [B])
    other = td.clone()
    other["observation"][3:] += 5
    other["action"][3:] *= -1
    one, two = losses(loss, td), losses(loss, other)
    for key, value in one.items():
        if not value.ndim:
            torch.testing.assert_close(value, two[key], msg=key)


@BOTH
def test_entries_can_be_selected(make: Callable[..., Any]) -> None:
    loss, td = make(), batch()
    named = {"_".join(k) if isinstance(k, tuple) else k: td[k] for k in loss.in_keys}
    loss.select_out_keys("loss_qvalue", "loss_actor")
    assert set(loss(td).keys()) == {"loss_qvalue", "loss_actor"}
    assert len(loss(**named)) == 2


def test_networks_may_be_made_where_numbers_are_doubles() -> None:
    """Whatever is the default, later networks of an ensemble are of the type of the first."""
    torch.set_default_dtype(torch.float64)
    try:
        q = models.qvalue_network(D, A, **SMALL)
        AWACLoss(models.gaussian_policy(D, A, **SMALL), q)
        td3bc(), cql()
    finally:
        torch.set_default_dtype(torch.float32)


# --- Cloning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("column", [False, True])
def test_cloning_of_discrete_actions_is_their_likelihood(reduction: Any, column: bool) -> None:
    policy = models.categorical_policy(D, 4, **SMALL)
    loss = BCLoss(policy, reduction=reduction)
    td = TensorDict({"observation": torch.randn(B, D), "action": torch.arange(B) % 4}, [B])
    logits = policy(td.select("observation"))["logits"].detach().double().numpy()
    likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -likelihood[np.arange(B), td["action"].numpy()]
    expected = {"mean": expected.mean, "sum": expected.sum, "none": lambda: expected}[reduction]()
    if column:
        td["action"] = td["action"].unsqueeze(-1)
    np.testing.assert_allclose(loss(td)["loss_bc"].detach().numpy(), expected, rtol=1e-5)
    (by_name,) = (loss(observation=td["observation"], action=td["action"]),)
    np.testing.assert_allclose(by_name.detach().numpy(), expected, rtol=1e-5)


def test_what_torchrls_cloning_does_otherwise() -> None:
    """It fails when TorchRL has mended it: then the subclass can go."""
    td = TensorDict({"observation": torch.randn(B, D), "action": torch.arange(B) % 4}, [B])
    with pytest.raises(RuntimeError, match=r"class probabilities|floating point"):
        objectives.BCLoss(models.categorical_policy(D, 4, **SMALL))(td)


def test_cloning_of_continuous_actions_is_torchrls() -> None:
    policy = models.gaussian_policy(D, A, **SMALL)
    td = batch()
    ours, theirs = BCLoss(policy)(td), objectives.BCLoss(policy)(td)
    assert torch.equal(ours["loss_bc"], theirs["loss_bc"])


def test_cloning_learns_a_rule_of_discrete_actions() -> None:
    observations = np.random.default_rng(0).normal(size=(400, D)).astype(np.float32)
    actions = (observations[:, 0] > 0).astype(np.int64) + 1
    ends = np.arange(400) % 20 == 19
    data = OfflineDataset.from_arrays(
        "rule",
        observations=observations,
        next_observations=observations,
        actions=actions,
        rewards=np.zeros(400),
        terminals=ends,
        action_space=Discrete(2, start=1),
    )
    policy = models.categorical_policy(D, 2, **SMALL)
    step = TrainStep(BCLoss(policy), learning_rate=1e-2)
    step.run(data.minibatches(64, seeds=[0]), 300)
    taken = policy(data.transitions.select("observation"))["logits"].argmax(-1)
    assert (taken == data.transitions["action"]).double().mean() > 0.97


# --- Windows ------------------------------------------------------------------------------------------------


def test_the_loss_of_windows_takes_nothing_else() -> None:
    pytest.importorskip("transformers")
    n = 40
    states = np.random.default_rng(0).normal(size=(n + 1, D))
    data = OfflineDataset.from_arrays(
        "walks",
        observations=states[:-1],
        next_observations=states[1:],
        actions=np.zeros((n, A)),
        rewards=np.ones(n),
        terminals=np.arange(n) % 10 == 9,
    ).windows(4)
    with pytest.raises(
        ValueError, match="walks is of windows of 4 transitions, and a buffer samples"
    ):
        data.replay_buffer(4)
    policy = models.decision_transformer(
        D, A, hidden_sizes=(8,), context=4, episode_length=10, target_return=1.0, return_scale=1.0
    )
    loss = DTLoss(policy.on_windows(), loss_function="l1", reduction="sum")  # pyright: ignore
    with pytest.raises(ValueError, match=r"shape \[4\] with time \[4\], expected windows"):
        loss(data.transitions[:4])
    source, indices = data.minibatches(8, seeds=[0])(block=0)
    td = source[indices[0, 0]]
    loss.eval()
    expected = loss(td)["loss_actor"]
    (by_name,) = (loss(**{key: td[key] for key in loss.in_keys}),)
    torch.testing.assert_close(by_name, expected)
    for change in ({"context": 0}, {"return_scale": 0.0}, {"return_scale": float("nan")}):
        its = {"context": 4, "episode_length": 10, "target_return": 1.0, "return_scale": 1.0}
        with pytest.raises(ValueError, match=next(iter(change))):
            models.decision_transformer(D, A, hidden_sizes=(8,), **{**its, **change})
