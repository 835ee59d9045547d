"""The benchmark measures what it says: the peers do the work, and the measuring adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode
from torchrl.objectives import LossModule

from torchrl_iql import IQLLoss
from torchrl_iql_recipes.speed import ours, timing, update
from torchrl_iql_recipes.speed.ours import loss_for
from torchrl_iql_recipes.speed.peers import TorchRL, contenders
from torchrl_iql_recipes.speed.work import Work

SMALL = Work(
    observation_size=5, action_size=3, hidden_sizes=(16, 8), transitions=200, batch_size=32
)


def our_loss(work: Work) -> IQLLoss:
    """Make our loss with parameters that differ in every entry, targets included."""
    loss = loss_for(work, seed=1)
    target = loss.target_qvalue_network_params.flatten_keys().values()
    with torch.no_grad():
        for tensor in (*loss.parameters(), *target):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return loss


def follow(loss: LossModule) -> None:
    """Move the target Q networks."""
    online = loss.qvalue_network_params.flatten_keys().data
    target = loss.target_qvalue_network_params.flatten_keys().data
    for key in online.keys():
        target[key].lerp_(online[key], SMALL.target_rate)


def counted_flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of all matrix products in a call."""
    counter = FlopCounterMode(display=False)
    # Its tracker of modules takes the truth value of a loss's parameters, a TensorDict, which has none.
    counter.mod_tracker = SimpleNamespace(
        __enter__=lambda: None, __exit__=lambda: None, parents={"Global"}
    )
    with counter:
        call()
    return counter.get_total_flops()


class TestTorchRL:
    @pytest.mark.parametrize("policy", ["tanh_normal", "gaussian"])
    def test_three_steps_by_hand(self, policy: str):
        peer = TorchRL(SMALL, policy=policy)
        batches = self.record(peer)
        loss = TorchRL(SMALL, policy=policy).loss  # the same seed
        adam = {name: torch.optim.Adam([p], lr=3e-4) for name, p in loss.named_parameters()}
        peer.run(3)
        for batch in batches:
            losses = loss(batch)
            total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]
            gradients = torch.autograd.grad(total, list(loss.parameters()))
            for (name, parameter), gradient in zip(loss.named_parameters(), gradients, strict=True):
                parameter.grad = gradient
                adam[name].step()
            follow(loss)
        assert len(batches) == 3
        expected = loss.state_dict()
        for key, value in peer.loss.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)

    @staticmethod
    def record(peer: TorchRL) -> list[TensorDict]:
        """Record the minibatches that the peer will draw, in a list that fills up."""
        batches, sample = [], peer.buffer.sample

        def recorded() -> TensorDict:
            batch = sample()
            batches.append(batch.clone())
            return batch

        peer.buffer.sample = recorded
        return batches

    @pytest.mark.parametrize("data_on_device", [False, True])
    def test_run_takes_the_steps(self, data_on_device: bool):
        peer = TorchRL(SMALL, data_on_device=data_on_device)
        self.check_run(peer)
        batch = peer.buffer.sample()
        assert batch.shape == (SMALL.batch_size,)

    @pytest.mark.slow
    def test_compiled_takes_the_same_steps(self):
        eager, compiled = TorchRL(SMALL), TorchRL(SMALL, "compiled")
        batches = self.record(compiled)
        self.check_run(compiled)
        remaining = iter(batches)
        eager.buffer.sample = lambda: next(remaining)
        eager.run(len(batches))
        expected = eager.loss.state_dict()
        for key, value in compiled.loss.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)

    @staticmethod
    def check_run(peer: TorchRL) -> None:
        before = {name: value.clone() for name, value in peer.loss.state_dict().items()}
        peer.run(7)
        assert {int(state["step"]) for state in peer.optimizer.state.values()} == {7}
        trained = [
            name
            for name, value in peer.loss.state_dict().items()
            if "params" in name and not torch.equal(value, before[name])
        ]
        assert len(trained) == len([name for name in before if "params" in name])

    def test_a_graph_needs_a_gpu(self):
        with pytest.raises(ValueError, match="cuda"):
            TorchRL(SMALL, "CUDA graph")

    def test_names_are_known_before_anything_is_built(self):
        builders = contenders(SMALL, replicas=(4,))
        assert builders["TorchRL, eager"]().name == "TorchRL, eager"
        assert list(builders) == [
            "TorchRL, eager",
            "TorchRL, compiled",
            "TorchRL, compiled, our policy",
            "JAX",
            "JAX, 4 learners",
        ]


class TestOurs:
    def test_names_are_known_before_anything_is_built(self):
        builders = ours.contenders(SMALL, replicas=(4,))
        assert list(builders) == [
            "torchrl-iql, the loss in a loop",
            "torchrl-iql, eager",
            "torchrl-iql, compiled",
            "torchrl-iql, compiled, 4 learners",
            "torchrl-iql, compiled, streaming",
            "torchrl-iql, compiled, step(batch)",
        ]
        for name in ("torchrl-iql, the loss in a loop", "torchrl-iql, compiled, step(batch)"):
            assert builders[name]().name == name
        on_gpu = ours.contenders(Work(device="cuda"), replicas=(4,))
        assert "torchrl-iql, cudagraph, step(batch)" in on_gpu

    def test_a_step_on_a_batch_is_that_of_the_loop(self):
        calls, loop = ours.Calls(SMALL, "eager"), ours.Loop(SMALL)
        drawn, sample = [], calls.buffer.sample

        def recorded() -> TensorDict:
            drawn.append(sample())
            return drawn[-1]

        calls.buffer.sample = recorded
        calls.run(5)
        assert (calls.step.steps, calls.replicas, len(drawn)) == (5, 1, 5)
        batches = iter(drawn)
        loop.buffer.sample = lambda: next(batches)
        loop.run(5)
        expected = loop.loss.state_dict()
        for key, value in calls.step.losses[0].state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
class TestJax:
    @pytest.fixture(autouse=True)
    def _modules(self):
        pytest.importorskip("jax")
        pytest.importorskip("optax")

    @staticmethod
    def batch() -> TensorDict:
        batch = SMALL.data()[: SMALL.batch_size]
        batch["next", "terminated"][::3] = True
        return batch

    @staticmethod
    def as_jax(loss: IQLLoss, of: str = "data") -> tuple[dict, list]:
        """Return the parameters of our loss, or their gradients, in the layout of the peer."""
        import jax.numpy as jnp

        def layers(parameters: TensorDict) -> list:
            weights, biases = [], []
            for key, value in parameters.flatten_keys().items():
                if key.endswith("weight"):
                    weights.append(jnp.asarray(getattr(value, of).mT.numpy()))
                elif key.endswith("bias"):
                    biases.append(jnp.asarray(getattr(value, of).numpy()))
            return list(zip(weights, biases, strict=True))

        policy = dict(loss.actor_network_params.flatten_keys().items())
        log_std = next(value for key, value in policy.items() if key.endswith("log_std"))
        parameters = {
            "policy": layers(loss.actor_network_params),
            "log_std": jnp.asarray(getattr(log_std, of).numpy()),
            "value": layers(loss.value_network_params),
            "qvalue": layers(loss.qvalue_network_params),
        }
        target = [] if of == "grad" else layers(loss.target_qvalue_network_params)
        return parameters, target

    def test_losses_and_gradients_are_ours(self):
        import jax

        from torchrl_iql_recipes.speed.jax_iql import columns, losses

        loss, batch = our_loss(SMALL), self.batch()
        expected = loss(batch.clone())
        (expected["loss_actor"] + expected["loss_qvalue"] + expected["loss_value"]).backward()
        parameters, target = self.as_jax(loss)
        arrays = columns(batch)

        def total(parameters: dict) -> tuple:
            parts = losses(SMALL, parameters, target, arrays)
            return sum(parts.values()), parts

        gradients, actual = jax.jit(jax.grad(total, has_aux=True))(parameters)
        assert actual.keys() == {"loss_actor", "loss_qvalue", "loss_value"}
        for name, value in actual.items():
            assert float(value) == pytest.approx(expected[name].item(), rel=1e-5), name
        self.check_close(gradients, self.as_jax(loss, of="grad")[0])

    @staticmethod
    def check_close(actual: object, expected: object) -> None:
        import jax
        import numpy as np

        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_a_step_is_adam_and_the_targets_follow(self):
        import jax

        from torchrl_iql_recipes.speed.jax_iql import columns, initial_state, step

        loss, batch = our_loss(SMALL), self.batch()
        optimizer = torch.optim.Adam(loss.parameters(), lr=SMALL.learning_rate)
        parameters, target = self.as_jax(loss)
        adam = initial_state(SMALL, jax.random.key(0))
        state = adam._replace(parameters=parameters, target=target)
        jitted = jax.jit(partial(step, SMALL))
        for _ in range(3):
            state, _ = jitted(state, columns(batch))
            losses = loss(batch.clone())
            optimizer.zero_grad()
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
            optimizer.step()
            follow(loss)
        expected, target = self.as_jax(loss)
        self.check_close(state.parameters, expected)
        self.check_close(state.target, target)

    def test_initialisation_is_orthogonal(self):
        import jax
        import numpy as np

        from torchrl_iql_recipes.speed.jax_iql import initial_state

        state = initial_state(SMALL, jax.random.key(0))
        for weight, bias in state.parameters["qvalue"]:
            for one in weight:
                rows, columns = one.shape
                gram = one @ one.T if rows < columns else one.T @ one
                np.testing.assert_allclose(gram, 2 * np.eye(len(gram)), atol=1e-5)
            assert not bias.any()
        first, second = state.parameters["qvalue"][0][0]
        assert (first != second).all()
        self.check_close(state.target, state.parameters["qvalue"])

    def test_on_a_cpu_its_memory_is_not_counted(self):
        from torchrl_iql_recipes.speed.jax_iql import JaxIQL

        assert JaxIQL(SMALL).peak_memory() is None

    @pytest.mark.parametrize("replicas, steps", [(1, 102), (3, 2)])
    def test_run_takes_the_steps(self, replicas: int, steps: int):
        import jax
        import numpy as np

        from torchrl_iql_recipes.speed.jax_iql import JaxIQL

        peer = JaxIQL(SMALL, replicas=replicas)
        before = jax.tree.map(np.array, (peer.state.parameters, peer.state.target))
        peer.run(steps)
        counts = np.asarray(peer.state.optimizer[0].count)
        np.testing.assert_array_equal(counts, np.full(counts.shape, steps))
        assert counts.size == replicas
        for old, new in zip(
            jax.tree.leaves(before),
            jax.tree.leaves((peer.state.parameters, peer.state.target)),
            strict=True,
        ):
            assert new.shape[:1] == ((3,) if replicas == 3 else old.shape[:1])
            assert (np.asarray(new) != old).any()
        if replicas == 3:  # they differ in initialisation and minibatches
            assert len(set(np.asarray(peer.losses["loss_actor"]).tolist())) == 3


class Clock:
    """Time that passes only while a contender runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A contender with a known speed, whose first step takes longer."""

    def __init__(self, name: str, clock: Clock, seconds: float, replicas: int = 1) -> None:
        self.name, self.clock, self.seconds, self.replicas = name, clock, seconds, replicas
        self.calls: list[tuple[int, float]] = []

    def run(self, steps: int) -> None:
        self.clock.now += steps * self.seconds + (0 if self.calls else 5.0)
        self.calls.append((steps, self.clock.now))


class TestMeasure:
    def measure(self, *fakes: Fake, **settings: object) -> list[timing.Result]:
        settings = {"rounds": 4, "seconds_per_round": 1.0, **settings}
        return timing.measure(fakes, clock=fakes[0].clock, **settings)

    def test_rates_ratios_and_compilation(self):
        clock = Clock()
        slow, fast = Fake("slow", clock, 0.02), Fake("fast", clock, 0.001, replicas=3)
        results = self.measure(slow, fast)
        assert [result.name for result in results] == ["slow", "fast"]
        assert results[0].median == pytest.approx(50)
        assert results[1].median == pytest.approx(3000)
        assert results[0].ratio == pytest.approx(1)
        assert results[1].ratio == pytest.approx(60)
        assert [result.steps for result in results] == [50, 1000]
        assert [result.compile_seconds for result in results] == pytest.approx([5, 5])

    def test_contenders_take_turns(self):
        clock = Clock()
        one, two = Fake("one", clock, 0.02), Fake("two", clock, 0.02)
        self.measure(one, two, rounds=3)
        turns = sorted(
            (end, name) for name, c in (("1", one), ("2", two)) for _, end in c.calls[-3:]
        )
        assert [name for _, name in turns] == ["1", "2"] * 3

    def test_the_ratio_is_taken_round_by_round(self):
        clock = Clock()
        one, two = Fake("one", clock, 0.01), Fake("two", clock, 0.005)
        run = two.run

        def slower_and_slower(steps: int) -> None:
            run(steps)
            one.seconds *= 2
            two.seconds *= 2

        two.run = slower_and_slower
        results = self.measure(one, two)
        assert results[1].ratios == pytest.approx([2, 2, 2, 2])
        assert results[1].rates[0] > 7 * results[1].rates[-1]

    def test_another_baseline(self):
        clock = Clock()
        results = self.measure(Fake("a", clock, 0.01), Fake("b", clock, 0.02), baseline="b")
        assert [result.ratio for result in results] == pytest.approx([2, 1])

    def test_one_that_fails_does_not_cost_the_others(self, capsys: pytest.CaptureFixture):
        clock = Clock()
        broken = Fake("broken", clock, 0.01)
        broken.run = lambda steps: 1 / 0
        results = self.measure(broken, Fake("fine", clock, 0.01))
        assert [result.name for result in results] == ["fine"]
        assert "broken is left out: ZeroDivisionError" in capsys.readouterr().out

    def test_mistakes_are_named(self):
        clock = Clock()
        with pytest.raises(ValueError, match="different names"):
            self.measure(Fake("a", clock, 0.01), Fake("a", clock, 0.01))
        with pytest.raises(ValueError, match="baseline must be one of"):
            self.measure(Fake("a", clock, 0.01), baseline="b")
        with pytest.raises(ValueError, match="no contender"):
            timing.measure([], rounds=1, seconds_per_round=1.0)

    def test_table_and_json(self, tmp_path: Path):
        results = [
            timing.Result("a", "a", 1, 10, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], 4.2),
            timing.Result("b", "a", 2, 10, [2000.0, 4000.0, 9000.0], [2.0, 2.5, 3.0], 0.0),
        ]
        lines = timing.table(results, limit=8000).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert "times a" in lines[0]
        assert lines[2] == "| a | 2 | 1 to 3 | 2 to 2 | 1.00 | 4.2 | 0% |"
        assert lines[3] == "| b | 4,000 | 2,000 to 9,000 | 3,000 to 6,500 | 2.50 | 0.0 | 50% |"
        assert timing.table(results).splitlines()[2] == "| a | 2 | 1 to 3 | 2 to 2 | 1.00 | 4.2 |"
        timing.write_json(tmp_path / "result.json", results, hardware=timing.hardware())
        written = json.loads((tmp_path / "result.json").read_text())
        assert written["results"][1]["rates"] == [2000.0, 4000.0, 9000.0]
        assert written["results"][1]["median"] == 4000
        assert torch.__version__.startswith(written["hardware"]["torch"])


class TestMachine:
    @pytest.mark.parametrize(
        "work", [Work(), Work(num_qvalue_nets=4), Work(hidden_sizes=(32, 16, 8), batch_size=7)]
    )
    def test_flops_are_those_of_our_step(self, work: Work):
        loss = our_loss(work)
        batch = Work(transitions=work.batch_size).data()

        def step() -> None:
            losses = loss(batch)
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()

        counted = counted_flops(step)
        sizes = work.observation_size, work.action_size, work.hidden_sizes
        assert timing.flops_per_step(*sizes, work.num_qvalue_nets, work.batch_size) == counted

    def test_flops_of_the_default_step(self):
        assert timing.flops_per_step(17, 6, (256, 256), 2, 256) == pytest.approx(540e6, rel=0.01)

    def test_policies_need_the_same_flops(self):
        counts = []
        for policy in ("tanh_normal", "gaussian"):
            peer = TorchRL(Work(transitions=512), policy=policy)
            counts.append(counted_flops(partial(peer.run, 1)))
        assert counts[0] == pytest.approx(counts[1], rel=0.01)

    def test_gemm_rate_is_that_of_a_product(self):
        rate = timing.gemm_rate("cpu", size=64, seconds=0.01)
        assert 1e8 < rate < 1e14

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_launch_floor(self):
        assert 1e-8 < timing.launch_floor("cuda") < 1e-4

    def test_no_launches_on_a_cpu(self):
        assert timing.launch_floor("cpu") is None

    def test_processors_of_one_name_are_told_apart(self, tmp_path: Path):
        information = tmp_path / "cpuinfo"
        milan = {
            "processor": 0,
            "vendor_id": "AuthenticAMD",
            "cpu family": 25,
            "model": 1,
            "model name": "AMD EPYC",
            "stepping": 1,
            "flags": "fpu sse2 avx avx2 bmi2",
        }

        def found(**entries: object) -> str:
            processor = milan | {name.replace("_", " "): value for name, value in entries.items()}
            lines = [f"{name}\t: {value}" for name, value in processor.items() if value != ""]
            information.write_text("\n".join([*lines, "", *lines, ""]))
            return timing.cpu_model(information)

        assert found() == "AMD EPYC (family 25, model 1, stepping 1, AVX2)"
        genoa = found(model=17, flags="avx avx2 avx512f avx512vl")
        assert genoa == "AMD EPYC (family 25, model 17, stepping 1, AVX-512)"
        assert found(flags="sse2") == "AMD EPYC (family 25, model 1, stepping 1)"
        assert found(model_name="") not in ("", "AMD EPYC")  # as on ARM: what Python says
        assert timing.cpu_model(tmp_path / "missing")

    def test_hardware(self):
        facts = timing.hardware()
        assert facts["threads"] == torch.get_num_threads()
        assert 1 <= facts["physical cores"] <= 4096
        assert facts["CPU"]


class TestScript:
    @pytest.mark.slow
    def test_prints_a_table_and_writes_json(
        self, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(update, "gemm_rate", lambda device: 1e11)
        for name in ("PJRT_NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
            monkeypatch.setenv(name, "restored afterwards")
        path = tmp_path / "update.json"
        sizes = ["--hidden", "8", "--batch-size", "16", "--transitions", "100"]
        lengths = ["--rounds", "2", "--seconds", "0.05", "--threads", "1", "--device", "cpu"]
        update.main([*sizes, *lengths, "--only", "torchrl, eager", "--json", str(path)])
        output = capsys.readouterr().out
        assert "| TorchRL, eager |" in output
        assert "compiled" not in output
        written = json.loads(path.read_text())
        assert written["work"]["hidden_sizes"] == [8]
        assert len(written["results"][0]["rates"]) == 2

    @pytest.mark.slow
    def test_quick_runs_in_seconds(self, capsys: pytest.CaptureFixture):
        assert update.main(["--quick", "--device", "cpu", "--threads", "1"]) == 0
        output = capsys.readouterr().out
        assert "| TorchRL, eager |" in output
        assert "| torchrl-iql, eager |" in output
        assert "JAX" not in output
        assert "compiled" not in output

    def test_quick_does_not_overrule_what_is_given(self):
        arguments = ["--quick", "--rounds", "7", "--hidden", "8"]
        options = update.parse(update.parser(None), update.QUICK, arguments)
        assert (options.rounds, options.hidden) == (7, [8])
        assert options.only == ("eager",)
        usual = update.parse(update.parser(None), update.QUICK, ["--rounds", "7"])
        assert (usual.only, usual.hidden) == ((), Work().hidden_sizes)

    @pytest.mark.parametrize("when", ["built", "run"])
    @pytest.mark.parametrize("who", ["TorchRL, eager", "torchrl-iql, eager"])
    def test_the_exit_status_tells_whether_one_of_ours_failed(
        self,
        when: str,
        who: str,
        capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ):
        class Contender:
            replicas = 1

            def __init__(self, name: str, build: object, configure: object) -> None:
                self.name = name
                if when == "built" and name == who:
                    raise RuntimeError("no reason")

            def run(self, steps: int) -> None:
                if self.name == who:
                    raise RuntimeError("no reason")

            def close(self) -> float:
                return 0.5

        monkeypatch.setattr(update, "Isolated", Contender)
        monkeypatch.setattr(update, "BASELINE", "torchrl-iql, the loss in a loop")
        monkeypatch.setattr(update, "gemm_rate", lambda device: 1e11)
        monkeypatch.setattr(timing, "_steps_per_round", lambda *_: 10)
        arguments = [
            "--device",
            "cpu",
            "--threads",
            "1",
            "--rounds",
            "1",
            "--only",
            "eager",
            "loop",
        ]
        status = update.main(arguments)
        output = capsys.readouterr().out
        assert status == (who == "torchrl-iql, eager")
        assert f"{who} is left out: " in output
        assert f"Left out: {who}." in output
        assert (f"Failed: {who}." in output) == (status == 1)

    def test_what_can_not_be_built_is_left_out(self, capsys: pytest.CaptureFixture):
        builders = {"JAX": partial(__import__, "no_such_package")}
        configure = partial(update.configure, 1, "highest")
        assert update.build(builders, ["jax"], configure) == []
        assert "JAX is left out: ModuleNotFoundError: No module" in capsys.readouterr().out
