"""Why IQL has a V: three objectives in a maze with a door that opens by chance, side by side as one picture.

    python recipes/comparison/luck.py

From the start to the goal leads a short way through the door, which opens one time in ten, and a way around
it. Data are random actions in all cells. All three objectives are trained on them by the same step, with
tables for networks:

- SARSA, the value of the behaviour: ``(r + gamma Q(s', a') - Q(s, a))^2``.
- The expectile of the TD error, ``L_2^tau(r + gamma Q(s', a') - Q(s, a))``: the best of what follows, of
  actions and of luck.
- IQL: the expectile of Q(s, a) over actions, by V, and the mean over what follows an action, by Q.

It prints a table, and takes half a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor, ValueOperator

from torchrl_iql import DiscreteIQLLoss, TrainStep
from torchrl_iql.objectives import functional as iql
from torchrl_iql.training import cosine_decay

MAZE = (
    "#########",
    "#s..d..g#",
    "#.#####.#",
    "#.#####.#",
    "#.......#",
    "#########",
)
OPENS = 0.1
"""How often the door does."""
DISCOUNT = 0.97
EXPECTILE = 0.95
STEPS = 1500
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
ARROWS = "↑→↓←"


class TDExpectileLoss(DiscreteIQLLoss):
    """The expectile where it does not belong: on the TD error with the data's next action. At 0.5, SARSA."""

    def _next_v(self, td: TensorDictBase) -> Tensor:
        return iql.min_q(
            self._q_ensemble(td.get("next"), self.target_qvalue_network_params)
        ).detach()

    def equations(self, outputs: iql.Outputs) -> dict[str, Tensor]:
        error = outputs.td_target - outputs.q
        loss = iql.expectile_loss(error, self.expectile).sum(0)
        return {**super().equations(outputs), "loss_qvalue": loss}


@dataclass(frozen=True)
class Maze:
    """What every action leads to, exactly.

    Attributes:
        cells: the free ones, (row, column), ``S`` of them.
        transitions: probabilities ``[S, 4, S]``; nothing leads out of the goal.
    """

    cells: list[tuple[int, int]]
    transitions: np.ndarray

    @classmethod
    def of(cls, rows: tuple[str, ...], opens: float) -> Maze:
        cells = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell != "#"]
        number = {cell: n for n, cell in enumerate(cells)}
        transitions = np.zeros((len(cells), len(MOVES), len(cells)))
        for n, (i, j) in enumerate(cells):
            for action, (di, dj) in enumerate(MOVES):
                ahead = (i + di, j + dj)
                passes = float(ahead in number) * (opens if rows[ahead[0]][ahead[1]] == "d" else 1)
                transitions[n, action, n] += 1 - passes
                if passes:
                    transitions[n, action, number[ahead]] += passes
        return cls(cells, transitions)

    def find(self, cell: str) -> int:
        return next(n for n, (i, j) in enumerate(self.cells) if MAZE[i][j] == cell)

    def before_the_door(self) -> int:
        """Return the cell from which the second move, to the right, leads through the door."""
        i, j = self.cells[self.find("d")]
        return self.cells.index((i, j - 1))

    def values(self, policy: np.ndarray) -> np.ndarray:
        """Solve for the value of a policy, ``[S, 4]`` probabilities, at reward -1 for each step."""
        goal = self.find("g")
        moves = np.einsum("sa,sat->st", policy, self.transitions)
        rewards = -np.ones(len(moves))
        moves[goal], rewards[goal] = 0, 0
        return np.linalg.solve(np.eye(len(moves)) - DISCOUNT * moves, rewards)

    def best_values(self) -> np.ndarray:
        """Iterate to the value of the best policy, ``[S]``."""
        v = np.zeros(len(self.cells))
        for _ in range(2000):
            v = (-1 + DISCOUNT * self.transitions @ v).max(1)
            v[self.find("g")] = 0
        return v


def data(maze: Maze, transitions: int, seed: int) -> TensorDict:
    """Draw transitions of random actions in random cells; equal ones become one, weighted by their number."""
    rng, goal, size = np.random.default_rng(seed), maze.find("g"), len(maze.cells)
    state = rng.choice([n for n in range(size) if n != goal], transitions)
    action = rng.integers(len(MOVES), size=transitions)
    sums = maze.transitions[state, action].cumsum(-1)
    after = (rng.random((transitions, 1)) < sums).argmax(-1)
    next_action = rng.integers(len(MOVES), size=transitions)
    drawn = np.stack([state, action, after, next_action], 1)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    cells, ended = torch.eye(size), torch.tensor(found[:, 2:3] == goal)
    return TensorDict(
        {
            "observation": cells[found[:, 0]],
            "action": torch.tensor(found[:, 1]),
            "priority_weight": torch.tensor(counts, dtype=torch.float32)[:, None],
            "next": {
                "observation": cells[found[:, 2]],
                "action": torch.tensor(found[:, 3]),
                "reward": -torch.ones(len(found), 1),
                "terminated": ended,
                "done": ended,
            },
        },
        [len(found)],
    )


def learned(make: type[DiscreteIQLLoss], expectile: float, batch: TensorDict) -> np.ndarray:
    """Train tables of Q and V on all of the data at every step; return Q, ``[S, 4]``."""
    size = batch["observation"].shape[-1]

    def table(columns: int) -> nn.Linear:
        linear = nn.Linear(size, columns, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    logits = TensorDictModule(table(len(MOVES)), in_keys=["observation"], out_keys=["logits"])
    policy = ProbabilisticActor(
        logits, in_keys=["logits"], distribution_class=torch.distributions.Categorical
    )
    q = TensorDictModule(table(len(MOVES)), ["observation"], ["state_action_value"])
    v = ValueOperator(table(1), in_keys=["observation"])
    loss = make(policy, q, v, action_space="categorical", num_qvalue_nets=1, expectile=expectile)
    loss.make_value_estimator(gamma=DISCOUNT)
    entries = ("loss_actor", "loss_qvalue", "loss_value")
    falling = dict.fromkeys(("qvalue_network", "value_network"), cosine_decay(STEPS))
    step = TrainStep(loss, entries=entries, learning_rate=0.2, schedule=falling, target_rate=0.3)
    for _ in range(STEPS):
        step(batch)
    (q,) = loss.qvalue_network_params.values(True, True)
    return q.detach().numpy().T


def draw(maze: Maze, panels: dict[str, tuple[np.ndarray, str]], png: Path) -> None:
    """Draw what each objective takes its best move for, with the move, and a line below."""
    lowest = min(q.max(1).min() for q, _ in panels.values())
    figure = Figure(figsize=(4 * len(panels), 3.1), dpi=150, layout="constrained")
    for axes, (title, (q, below)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        v = q.max(1)
        v[maze.find("g")] = 0
        picture = np.full((len(MAZE), len(MAZE[0])), np.nan)
        for n, cell in enumerate(maze.cells):
            picture[cell] = v[n]
        axes.set_facecolor("#2f3640")
        image = axes.imshow(picture, vmin=lowest, vmax=0, cmap="viridis")
        for n, (i, j) in enumerate(maze.cells):
            kind = MAZE[i][j]
            text = {"s": "start\n", "d": "door\n", "g": "goal"}.get(kind, "")
            arrow = "" if kind == "g" else ARROWS[int(q[n].argmax())]
            colour = "black" if v[n] > lowest / 2 else "white"
            axes.text(j, i, text + arrow, ha="center", va="center", color=colour, fontsize=7)
        axes.set(xticks=[], yticks=[], title=title)
        axes.set_xlabel(below, fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="value of the best move", shrink=0.8)
    figure.savefig(png)


OBJECTIVES: dict[str, tuple[type[DiscreteIQLLoss], float]] = {
    "SARSA": (TDExpectileLoss, 0.5),
    "expectile of the TD error": (TDExpectileLoss, EXPECTILE),
    "IQL": (DiscreteIQLLoss, EXPECTILE),
}


def compare(transitions: int, seed: int, png: Path) -> list[str]:
    """Train all three, and say what each believes and what its greedy policy is worth.

    Returns:
        the lines of a table.
    """
    maze = Maze.of(MAZE, OPENS)
    batch, start, before = data(maze, transitions, seed), maze.find("s"), maze.before_the_door()
    lines = [
        "| objective | Q of the door | exactly | value of its greedy policy at the start |",
        "| --- | ---: | ---: | ---: |",
    ]
    panels = {}
    for title, (make, expectile) in OBJECTIVES.items():
        q = learned(make, expectile, batch)
        greedy = maze.values(np.eye(len(MOVES))[q.argmax(1)])
        exact = -1 + DISCOUNT * maze.transitions[before, 1] @ greedy
        lines.append(f"| {title} | {q[before, 1]:.1f} | {exact:.1f} | {greedy[start]:.1f} |")
        panels[title] = q, f"greedy policy from the start: {greedy[start]:.1f}"
    lines.append(f"| the best policy | | {maze.best_values()[start]:.1f} at the start | |")
    draw(maze, panels, png)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, default=Path("luck.png"))
    args = parser.parse_args()
    print("\n".join(compare(args.transitions, args.seed, args.png)))
    print(f"Picture: {args.png}")


if __name__ == "__main__":
    main()
