"""Many losses in one program: compiling takes most of a test's time, and the head is the same for all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import losses


@dataclasses.dataclass(frozen=True)
class MixedLoss:
    """A loss that is another one for every group, each in units of its steepest slope."""

    entries: tuple[losses.Loss, ...]

    def of_logps(self, logps_BK, operands):
        """Return each group's own loss; `operands` are those that the method of that name returns."""
        completions, entry_BK, unit_BK = operands
        each_B = [loss.of_logps(logps_BK, completions) for loss in self.entries]
        own_B = sum(jnp.where(entry_BK[:, 0] == index, loss_B, 0) for index, loss_B in enumerate(each_B))
        return own_B / unit_BK[:, 0]

    def operands(self, completions: losses.Completions, logps_BK, *, of_group):
        """Return the operands with which group b has the loss `entries[of_group[b]]`, at about these log-probs."""
        of_group = np.asarray(of_group)
        entry_BK = np.broadcast_to(of_group[:, None], logps_BK.shape).astype(np.float32)
        plain = (completions, entry_BK, np.ones(logps_BK.shape, np.float32))
        slope_BK = np.abs(jax.grad(lambda logps_BK: jnp.sum(self.of_logps(logps_BK, plain)))(jnp.asarray(logps_BK)))
        units = np.array([slope_BK[of_group == index].max(initial=0) for index in range(len(self.entries))])
        return completions, entry_BK, np.broadcast_to(units[of_group][:, None], logps_BK.shape).astype(np.float32)
