"""Smoke in a box with a solid ball going round in it: the usual steps of fluid animation on a staggered grid.

Source: J. Stam, "Stable fluids", SIGGRAPH 1999, on the staggered grid of F. Harlow and J. Welch, 1965. Cells have side
one, a step takes one unit of time; axis 0 points up, the box is open above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kantor.datasets.poisson_scenes import FLUID, SOLID, moving_ball

RADIUS = 0.15  # of the ball, relative to the shorter side: that of moving_ball


class Flow:
    """Velocities on the faces and smoke in the cells of a box (ny, nx) at one time.

    ``v`` (ny + 1, nx) are the velocities up, entry i on the face between cells i - 1 and i; ``u`` (ny, nx + 1) those to
    the right; ``smoke`` (ny, nx). One round of the ball takes ``steps`` steps.
    """

    def __init__(self, shape: tuple[int, int], steps: int) -> None:
        self.shape, self.steps, self.step = shape, steps, 0
        ny, nx = shape
        self.v, self.u = torch.zeros(ny + 1, nx, dtype=torch.float64), torch.zeros(ny, nx + 1, dtype=torch.float64)
        self.smoke = torch.zeros(shape, dtype=torch.float64)
        self.flags = moving_ball(shape, 0.0)

    @property
    def centre(self) -> tuple[float, float]:
        """Position of the ball's centre, in cells."""
        angle = 2 * math.pi * self.step / self.steps
        return self.shape[0] * (0.5 + 0.25 * math.sin(angle)), self.shape[1] * (0.5 + 0.25 * math.cos(angle))

    def move(self) -> Tensor:
        """Do everything of a step but the projection; return the right-hand side of the pressure equation, (ny, nx).

        Everything is carried along the velocity, hot smoke rises, the ball moves on and pushes what is beside it.
        """
        ny, nx = self.shape
        y, x = torch.meshgrid(torch.arange(ny + 1.0).double(), torch.arange(nx + 1.0).double(), indexing="ij")
        smoke = self._carried(self.smoke, y[:ny, :nx] + 0.5, x[:ny, :nx] + 0.5, 0.5, 0.5)
        v = self._carried(self.v, y[:, :nx], x[:, :nx] + 0.5, 0.0, 0.5)
        u = self._carried(self.u, y[:ny] + 0.5, x[:ny], 0.5, 0.0)
        self.step += 1
        self.flags = moving_ball(self.shape, self.step / self.steps)
        smoke[((x[:ny, :nx] + 0.5 - nx / 2) / (0.1 * nx)) ** 2 + ((y[:ny, :nx] + 0.5) / (0.07 * ny)) ** 2 < 1] = 1.0
        smoke[self.flags == SOLID] = 0.0
        v[1:ny] += 3e-3 * ny * (120 / self.steps) ** 2 * (smoke[1:] + smoke[:-1]) / 2
        self.smoke, self.v, self.u = smoke, v, u
        self._close_faces()
        return -self.divergence()

    def project(self, p: Tensor) -> None:
        """Subtract the gradient of the pressure, zero in air, on all faces that are not closed."""
        closed_v, closed_u = self._closed()
        self.v[1:-1] -= torch.where(closed_v[1:-1], 0.0, p[1:] - p[:-1])
        self.u[:, 1:-1] -= torch.where(closed_u[:, 1:-1], 0.0, p[:, 1:] - p[:, :-1])
        self.v[-1] = self.v[-2]  # what arrives above leaves

    def divergence(self) -> Tensor:
        """Net flow out of every fluid cell, (ny, nx); zero elsewhere."""
        net = self.v[1:] - self.v[:-1] + self.u[:, 1:] - self.u[:, :-1]
        return torch.where(self.flags == FLUID, net, 0.0)

    def _closed(self) -> tuple[Tensor, Tensor]:
        """Faces beside the ball, shaped like v and u."""
        ball = (self.flags == SOLID).to(torch.uint8)
        row, column = ball.new_zeros(1, self.shape[1]), ball.new_zeros(self.shape[0], 1)
        below, above = torch.cat([row, ball]), torch.cat([ball, row])
        left, right = torch.cat([column, ball], 1), torch.cat([ball, column], 1)
        return (below | above) > 0, (left | right) > 0

    def _close_faces(self) -> None:
        """Velocity of the ball on its faces, none on the walls."""
        closed_v, closed_u = self._closed()
        angle, turn = 2 * math.pi * self.step / self.steps, 2 * math.pi / self.steps
        self.v[closed_v] = 0.25 * self.shape[0] * turn * math.cos(angle)
        self.u[closed_u] = -0.25 * self.shape[1] * turn * math.sin(angle)
        self.v[0] = 0.0
        self.u[:, 0] = self.u[:, -1] = 0.0

    def _carried(self, field: Tensor, y: Tensor, x: Tensor, offset_y: float, offset_x: float) -> Tensor:
        """The field where the flow was a step ago, by the midpoint rule; entry (0, 0) of the field is at the offset."""
        dy, dx = self._velocity(y, x)
        dy, dx = self._velocity(y - dy / 2, x - dx / 2)
        return _interpolated(field, y - dy - offset_y, x - dx - offset_x)

    def _velocity(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return _interpolated(self.v, y, x - 0.5), _interpolated(self.u, y - 0.5, x)


def _interpolated(field: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear values of the field at places in units of its entries; constant beyond the rim."""
    y, x = y.clamp(0, field.shape[0] - 1), x.clamp(0, field.shape[1] - 1)
    i, j = y.long().clamp(max=field.shape[0] - 2), x.long().clamp(max=field.shape[1] - 2)
    s, t = y - i, x - j
    below = (1 - t) * field[i, j] + t * field[i, j + 1]
    above = (1 - t) * field[i + 1, j] + t * field[i + 1, j + 1]
    return (1 - s) * below + s * above
