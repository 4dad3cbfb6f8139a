"""The demonstration's arithmetic: its reward, GRPO's advantages and loss."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from trajstore_demo.task import END, prompts, score  # noqa: E402
from trajstore_demo.training import advantages, policy_loss  # noqa: E402
from trajstore_trainer import padded_batch  # noqa: E402

pytestmark = pytest.mark.torch


def tokens(text):
    return np.frombuffer(text, np.uint8).astype(np.int32)


def test_reward_is_the_share_of_bytes_in_known_words():
    assert score(tokens(b"the")) == (1.0, {"known": 1.0, "words": 1.0})
    assert score(tokens(b"the xqz")) == (3 / 7, {"known": 1.0, "words": 2.0})
    assert score(np.append(tokens(b"the "), END)) == (3 / 4, {"known": 1.0, "words": 1.0})
    assert score(np.array([END], np.int32))[0] == 0.0


def test_prompts_differ_in_length_and_come_from_the_passages():
    given = prompts(24)
    assert len({len(prompt) for prompt in given}) > 5
    assert bytes(given[0].astype(np.uint8)).startswith(b"Four score and seven years")


def test_advantages_are_relative_to_the_group():
    got = advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), ("a", "a", "b", "b"))
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_loss_of_unchanged_weights_is_minus_the_mean_advantage_and_its_kl_zero(embedded):
    """Ratios are 1 where the trainer's logprobs are the rollout's."""
    model = Uniform(vocabulary=8)
    logprob = -float(np.log(8))
    loaded = []
    for sampled in ([1, 2], [3]):
        trajectory = embedded.create()
        with trajectory.segment(context=[5, 6, 7]) as segment:
            segment.tokens(sampled, [logprob] * len(sampled))
        embedded.flush()
        loaded.append(embedded.load(trajectory.id))
    loss, kl = policy_loss(model, padded_batch(loaded), torch.tensor([1.0, -2.0]))
    assert float(loss) == pytest.approx(-(1.0 + 1.0 - 2.0) / 3, abs=1e-6)
    assert kl == pytest.approx(0.0, abs=1e-6)


class Uniform(torch.nn.Module):
    """A language model that holds every token equally likely."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))
