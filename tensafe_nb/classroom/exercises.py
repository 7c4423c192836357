"""The exercises of the notebooks: what each looks at, and what it says to answers that are nearly right.

A check computes what is right, or tries the answer on examples. Solutions are in `notebooks/solutions`.
"""

import asyncio
import math
import random
import threading
from typing import Any

import numpy as np

from tensafe_nb.classroom.checking import Hint, called, exercise, near, number_in, numbers_in, texts_in
from tensafe_nb.display import as_given

# 01 · Quickstart


@exercise("01.1", right="two matrices, one of 8 × 128 and one of 128 × 8: an eighth of what the whole has.")
def lora_numbers(answer: Any) -> None:
    rank, size = 8, 128
    number = number_in(answer)
    if number == size * size:
        raise Hint("that is the whole matrix. LoRA trains two thin ones in its place.")
    if number == rank * size:
        raise Hint("that is one of the two thin matrices.")
    if number != 2 * rank * size:
        raise Hint("count the numbers of A, which is rank × columns, and of B, which is rows × rank.")


@exercise(
    "01.2",
    right="a perplexity of 10 is the doubt of somebody who guesses among 10 tokens that are equally likely.",
)
def perplexity(answer: Any) -> None:
    for loss in (0.0, 1.0, math.log(10)):
        given = number_in(called(answer, loss))
        if loss and near(given, 2**loss):
            raise Hint("the loss is in nats, so the base is e and not 2.")
        if not near(given, math.exp(loss)):
            raise Hint(
                f"at a loss of {loss:.3g} it should not be {given:.4g}. A loss of 0 is a perplexity of 1."
            )


@exercise("01.3", right="the prompt is read, and only the completion is learnt.")
def prompt_completion_row(answer: Any) -> None:
    if not isinstance(answer, dict):
        raise Hint("a row is a dict, like train[0].")
    if set(answer) == {"text"}:
        raise Hint("of a text every token is learnt, the question too. Part it in two.")
    if set(answer) != {"prompt", "completion"}:
        raise Hint("look at the two names in train[0].")
    if "2+2=" not in str(answer["prompt"]) or str(answer["completion"]).strip() != "4":
        raise Hint("which part is given, and which is to be learnt?")


# 02 · Async pipelining


@exercise(
    "02.1", right="a step whose gradients are not whole is not taken, and the window after it starts clean."
)
def failing_steps(answer: Any) -> None:
    number = number_in(answer)
    if number == 0:
        raise Hint(
            "an optim_step does not train on what is left of a window: what does it do when its forward_backward "
            "was cancelled?"
        )
    if number == 20:
        raise Hint("a failure stops what depends on it, and no more than that.")
    if number != 10:
        raise Hint("each optim_step depends on the forward_backward just before it.")


@exercise("02.2", right="gather waits for all, and hands failures back as values when it is asked to.")
def failures_among_handles(answer: Any) -> None:
    async def handles(failing: int, fine: int) -> Any:
        loop = asyncio.get_running_loop()
        made = [loop.create_future() for _ in range(failing + fine)]
        for number, future in enumerate(made):
            if number < failing:
                loop.call_soon(future.set_exception, RuntimeError("cancelled"))
            else:
                loop.call_soon(future.set_result, number)
        random.Random(failing).shuffle(made)
        try:
            found = called(answer, made, shown="handles", awaited=True)
            if not asyncio.iscoroutine(found):
                raise Hint("the function is `async def`, so that it can await the handles.")
            return await asyncio.wait_for(found, 5)
        finally:
            await asyncio.gather(*made, return_exceptions=True)

    for failing, fine in ((0, 3), (2, 3), (3, 0)):
        try:
            found = number_in(on_a_thread(handles(failing, fine)))
        except (RuntimeError, TimeoutError):
            raise Hint(
                "a handle that failed raises when it is awaited: catch it, or ask gather to return it."
            ) from None
        if found != failing:
            raise Hint(f"of {failing + fine} handles {failing} failed, and it says {found:g}.")


def on_a_thread(work: Any) -> Any:
    """Run a coroutine where no loop runs, whatever runs here, and return what it returns."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [asyncio.run(work), None]
        except BaseException as error:  # noqa: BLE001  # handed on to whoever waits
            outcome[:] = [None, error]

    thread = threading.Thread(target=run, name="exercise")
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


# 03 · Losses


@exercise("03.1", right="the label of a position is the token after it; the last position has none.")
def shifted_labels(answer: Any) -> None:
    given = numbers_in(answer, 4)
    if given == [5, 6, 7, 8]:
        raise Hint(
            "these are the inputs: at each position the model would be asked for what it has just read."
        )
    if given[:3] != [6, 7, 8]:
        raise Hint("labels[t] is what the model should say after it has read input_ids[t].")
    if given[3] != -100:
        raise Hint("nothing follows the last token: which label is left out of the loss?")


@exercise("03.2", right="a pair that is apart by more than the margin teaches nothing any more.")
def margin_loss(answer: Any) -> None:
    for chosen, rejected, margin in (
        (-3.0, -5.0, 0.5),
        (-5.0, -3.0, 0.5),
        (-3.0, -3.2, 0.5),
        (1.0, 1.0, 2.0),
    ):
        given = number_in(called(answer, chosen, rejected, margin))
        wanted = max(0.0, margin - (chosen - rejected))
        if given < 0:
            raise Hint(
                "a pair that is far enough apart costs nothing, and it pays nothing either: what is the least?"
            )
        if near(given, max(0.0, margin - (rejected - chosen))) and not near(given, wanted):
            raise Hint("this is small when the rejected answer is the more likely one.")
        if not near(given, wanted):
            raise Hint(
                f"at chosen={chosen}, rejected={rejected}, margin={margin} it should not be {given:.4g}."
            )


@exercise(
    "03.3", right="a first loss far above this means that the labels are wrong, and not that the model is."
)
def uniform_loss(answer: Any) -> None:
    number = number_in(answer)
    if near(number, math.log2(2048)):
        raise Hint("that is in bits; losses are in nats.")
    if not near(number, math.log(2048), 1e-3):
        raise Hint("the probability of each token is 1/2048, and the loss is −log of the right one's.")


# 04 · Checkpoints


@exercise("04.1", right="push it with service.push_artifact: the seal notices one byte among a million.")
def one_byte_changed(answer: Any) -> None:
    for data in (b"\x00\x01\x02\x03", bytes(range(256))):
        given = called(answer, data)
        if not isinstance(given, bytes | bytearray):
            raise Hint(f"it returns bytes; this is {as_given(given)}.")
        if len(given) != len(data):
            raise Hint("no byte is added or taken away: one is another than before.")
        changed = sum(a != b for a, b in zip(given, data, strict=True))
        if changed != 1:
            raise Hint(f"one byte should be another than before, and {changed} are.")


@exercise("04.2", right="the disk holds three, however long the run.")
def kept_checkpoints(answer: Any) -> None:
    given = sorted(numbers_in(answer))
    if given == [50, 100, 150]:
        raise Hint("keep_last keeps the newest.")
    if len(given) != 3:
        raise Hint("keep_last says how many are left.")
    if given != [300, 350, 400]:
        raise Hint("a checkpoint every 50 steps, and the run ends at 400: which are the newest?")


# 05 · Reinforcement learning


@exercise(
    "05.1", right="each answer is measured by the others alone, so that its own luck is not in its baseline."
)
def leave_one_out(answer: Any) -> None:
    for rewards in ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.25, 0.5, 1.0, 0.0, 0.75]):
        given = np.array(numbers_in(called(answer, list(rewards)), len(rewards)))
        array = np.array(rewards)
        if np.allclose(given, array - array.mean()):
            raise Hint(
                "that is the mean of the whole group: an answer's own reward is in its baseline. Leave it out."
            )
        if not np.allclose(given, (array - array.mean()) * len(array) / (len(array) - 1)):
            raise Hint(
                f"for {rewards} it should not be {as_given(given.round(3).tolist())}. The baseline of an answer is "
                f"the mean reward of the other answers."
            )


@exercise("05.2", right="it pays for the sum and nothing else, and says 0 to nonsense in place of failing.")
def strict_sum(answer: Any) -> None:
    for response in ("046", "047", "46", "0460", "046 ", "", "abc", "４６"):
        meta = {"answer": "046"}
        given = number_in(called(answer, "12+34=", response, meta, shown=f"'12+34=', {response!r}, {meta}"))
        if response == "046" and given != 1:
            raise Hint("the right answer, '046', earns 1.")
        if response != "046" and given:
            raise Hint(f"the response {response!r} is not the answer '046', and earns {given:g}.")


@exercise(
    "05.3",
    right="half-solved prompts teach most. At a solve rate of 5 % two groups of eight in three say nothing.",
)
def silent_groups(answer: Any) -> None:
    for p, size in ((0.5, 2), (0.5, 8), (0.05, 8), (1.0, 4)):
        given = number_in(called(answer, p, size))
        if near(given, p**size) and not near(given, p**size + (1 - p) ** size):
            raise Hint("these are the groups in which all are right. There is another way to be of one mind.")
        if not near(given, p**size + (1 - p) ** size):
            raise Hint(
                f"at a solve rate of {p} and {size} answers it should not be {given:.4g}: all right, or all wrong."
            )


# 06 · Reward functions


@exercise("06.1", right="one text for every question: training would find it too, since it pays every time.")
def paid_for_nothing(answer: Any) -> None:
    if not isinstance(answer, str):
        raise Hint(f"the answer is a text, what a model would say, and not {as_given(answer)}.")
    if len(answer) > 20:
        raise Hint("it works with 20 characters, too.")
    for total in range(0, 200):
        missing = next((digit for digit in f"{total:03d}" if digit not in answer), None)
        if missing is not None:
            raise Hint(f"it is not paid where the sum is {total:03d}. What do all sums have in common?")


@exercise(
    "06.2", right="wrong, well formed, and impossible to judge are three different things, and None is not 0."
)
def three_grades(answer: Any) -> None:
    cases = {"046": 1.0, "047": 0.5, "46": 0.0, "0466": 0.0, "ab1": 0.0, "": 0.0}
    for response, wanted in cases.items():
        given = number_in(
            called(answer, "12+34=", response, {"answer": "046"}, shown=f"'12+34=', {response!r}, …")
        )
        if given != wanted:
            raise Hint(
                f"of the answer '046' the response {response!r} earns {given:g}. Is it right, three digits, or neither?"
            )
    try:
        without = answer("12+34=", "046", {})
    except Exception as error:  # noqa: BLE001  # it is the student's code
        raise Hint(
            f"where meta has no answer it raised {type(error).__name__}: meta.get('answer') asks for it."
        ) from None
    if without is not None:
        raise Hint(
            f"where meta has no answer nobody can say what is right, and it returned {as_given(without)}."
        )


# 07 · Differential privacy


@exercise("07.1", right="nobody's gradient is longer than C now, and so nobody can move the sum by more.")
def clipped(answer: Any) -> None:
    for gradient, bound in (([3.0, 4.0], 1.0), ([0.3, 0.4], 1.0), ([0.0, 0.0], 1.0), ([-6.0, 8.0], 5.0)):
        given = np.array(numbers_in(called(answer, list(gradient), bound), 2))
        array = np.array(gradient)
        norm = float(np.linalg.norm(array))
        if norm < bound and norm and near(float(np.linalg.norm(given)), bound):
            raise Hint("a gradient that is short enough stays as it is.")
        if np.allclose(given, np.clip(array, -bound, bound)) and norm > bound:
            raise Hint("each number by itself turns the gradient another way: shorten it as a whole.")
        if not np.allclose(given, array * min(1.0, bound / norm if norm else 1.0)):
            raise Hint(
                f"for {gradient} and C={bound:g} it should not be {as_given(given.round(3).tolist())}. Its length "
                f"is {norm:g}."
            )


@exercise(
    "07.2",
    right="the noise is the same whether 10 or 1,000 take part: with many, less of it is left in the mean.",
)
def noise_of_the_mean(answer: Any) -> None:
    for sigma, bound, size in ((1.0, 1.0, 64), (2.0, 0.5, 10), (0.8, 3.0, 100)):
        given = number_in(called(answer, sigma, bound, size))
        if near(given, sigma * bound):
            raise Hint("that is the noise on the sum. The mean divides it.")
        if near(given, sigma * bound / math.sqrt(size)):
            raise Hint("the noise is added once, to the sum, and not once for each row.")
        if not near(given, sigma * bound / size):
            raise Hint(f"at σ={sigma}, C={bound} and {size} rows it should not be {given:.4g}.")


@exercise("07.3", right="what was looked at has been looked at: no rollback gives it back.")
def spent_after_rollback(answer: Any) -> None:
    number = number_in(answer)
    if number == 1.5:
        raise Hint("the weights are those of step 200 again. But who saw step 600 has seen it.")
    if number != 3:
        raise Hint("ε counts what was released. Does a rollback take a release back?")


# 08 · A remote server


@exercise("08.1", right="texts are scored in your kernel; whatever needs the model runs where the model is.")
def runs_here(answer: Any) -> None:
    given = set(texts_in(answer))
    verbs = {"forward_backward", "optim_step", "sample", "reward", "save_state"}
    if unknown := given - verbs:
        raise Hint(f"{as_given(min(unknown))} is none of the five.")
    if "reward" not in given:
        raise Hint("which of them is a function of yours that only reads texts?")
    if given != {"reward"}:
        raise Hint("what needs the model's weights runs at the server.")


@exercise("08.2", right="with both set, ServiceClient() is remote, and no notebook holds a key.")
def variables(answer: Any) -> None:
    given = texts_in(answer)
    if any(name.lower().startswith("http") for name in given):
        raise Hint("the names of the variables, not what they hold.")
    if len(given) != 2:
        raise Hint("there are two: one for the address, one for the key.")
    if set(given) != {"TENSAFE_BASE_URL", "TENSAFE_API_KEY"}:
        raise Hint("both begin with TENSAFE_ and end like the arguments of ServiceClient: base_url, api_key.")


# 09 · Homomorphic LoRA


@exercise(
    "09.1",
    right="two thin products in place of a wide one, and a scale that does not depend on the rank you try.",
)
def adapter_output(answer: Any) -> None:
    draw = np.random.default_rng(0)
    for rank, alpha in ((2, 4.0), (4, 4.0)):
        a, b, x = draw.normal(size=(rank, 6)), draw.normal(size=(5, rank)), draw.normal(size=6)
        given = np.array(numbers_in(called(answer, a, b, x, alpha, shown="A, B, x, alpha"), 5))
        if np.allclose(given, b @ (a @ x)) and alpha != rank:
            raise Hint("the scale alpha / rank is missing.")
        if not np.allclose(given, alpha / rank * (b @ (a @ x))):
            raise Hint(
                f"A is {a.shape}, B is {b.shape}, x is {x.shape}: A is applied to x first, then B, and the scale is "
                f"alpha / rank."
            )


@exercise(
    "09.2",
    right="so clients that average A and B apart do not average their adapters; with one A for all they do.",
)
def means_of_products(answer: Any) -> None:
    a1, b1, a2, b2 = numbers_in(answer, 4)
    if near((a1 * b1 + a2 * b2) / 2, (a1 + a2) / 2 * (b1 + b2) / 2):
        equal = (
            "the two A are equal"
            if a1 == a2
            else "the two B are equal"
            if b1 == b2
            else "they agree by chance"
        )
        raise Hint(f"here both ways give the same ({equal}). Let A and B of the two clients differ.")


# 10 · A real model


@exercise(
    "10.1",
    right="and training all of it with AdamW takes four times as much: weights, gradients, two moments.",
)
def megabytes(answer: Any) -> None:
    number = number_in(answer)
    if near(number, 270, 0.01):
        raise Hint("that is two bytes each, as in bfloat16. How many has a float32?")
    if near(number, 540e6, 0.01):
        raise Hint("these are bytes; a megabyte is a million of them.")
    if not near(number, 540, 0.01):
        raise Hint("so many million numbers, times the bytes of each.")


@exercise("10.2", right="the tone is in the assistant's turn, and it is that turn that is learnt.")
def chat_row(answer: Any) -> None:
    if not isinstance(answer, dict) or "messages" not in answer:
        raise Hint('a row of chat is {"messages": [ … ]}.')
    turns = answer["messages"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns
    ):
        raise Hint('each message is {"role": …, "content": …}.')
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise Hint(f"its roles are {as_given(roles)}. Somebody asks, and who answers has the last word.")
    if not all(str(turn["content"]).strip() for turn in turns):
        raise Hint("a message has no content: what is said in it?")


# 11 · Environments


@exercise("11.1", right="a conversation that says how far off a guess was, and pays more for fewer guesses.")
def higher_or_lower(answer: Any) -> None:
    for guesses in ([7], [5, 9, 7], [9, 8, 7]):
        talk = called(answer, {"secret": 7})
        if not hasattr(talk, "send"):
            raise Hint(
                "the function yields what the model is told, and returns the reward: it has a `yield` in it."
            )
        played(talk, guesses)


def played(talk: Any, guesses: list[int]) -> None:
    """Play one conversation, and look at what it says."""
    try:
        opening = next(talk)
    except StopIteration:
        raise Hint("it ended before the model was told anything.") from None
    if not isinstance(opening, str) or not opening.strip():
        raise Hint("the first `yield` is the question, a text.")
    for turn, guess in enumerate(guesses, 1):
        try:
            told = str(talk.send(str(guess))).lower()
        except StopIteration as end:
            if guess != 7:
                raise Hint(f"the secret is 7, and it ended at the guess {guess}.") from None
            if end.value is None or not near(number_in(end.value), 1 / turn):
                raise Hint(
                    f"found at guess {turn} it pays {as_given(end.value)}: one divided by the guesses is asked for."
                ) from None
            return
        except Exception as error:  # noqa: BLE001  # it is the student's code
            raise Hint(
                f"it raised {type(error).__name__} at the guess '{guess}': what is sent is a text."
            ) from None
        if guess == 7:
            raise Hint("the secret was guessed, and the conversation goes on.")
        word, other = ("higher", "lower") if guess < 7 else ("lower", "higher")
        if word not in told or other in told:
            raise Hint(
                f"the secret is 7 and the guess {guess}: the model is to hear {word!r}, and hears {as_given(told)}."
            )


@exercise("11.2", right="what the environment says is read, and is no part of the loss.")
def learnt_tokens(answer: Any) -> None:
    number = number_in(answer)
    if number == 14:
        raise Hint("these are all tokens; a policy learns from what it said itself.")
    if number == 9:
        raise Hint("this is what the environment said.")
    if number != 5:
        raise Hint("add up the turns of the policy.")


# 12 · Comparing ideas


@exercise(
    "12.1",
    right="what all seeds have in common drops out, and the interval is narrower than that of two means.",
)
def paired(answer: Any) -> None:
    for a, b in (([0.1, 0.2, 0.3], [0.2, 0.3, 0.5]), ([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 3.0])):
        differences = np.array(b) - np.array(a)
        given = numbers_in(called(answer, list(a), list(b)), 2)
        mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(a)))
        if near(given[0], -mean):
            raise Hint("b minus a is asked for.")
        if not near(given[0], mean):
            raise Hint(f"the mean of the differences of {a} and {b} is not {given[0]:.4g}.")
        if near(given[1], float(differences.std(ddof=1))):
            raise Hint("that is how far single differences spread. The mean of n is surer by √n.")
        if near(given[1], float(differences.std() / math.sqrt(len(a)))):
            raise Hint("with so few seeds divide by n − 1 inside the standard deviation: np.std(…, ddof=1).")
        if not near(given[1], error):
            raise Hint(
                "the second number is the standard error: the standard deviation of the differences, over √n."
            )


@exercise(
    "12.2",
    right="with five ideas ten differences are looked at, and one in twenty of nothing looks like something.",
)
def pairs_of_arms(answer: Any) -> None:
    for arms in (2, 3, 5, 10):
        given = number_in(called(answer, arms))
        if given == arms * (arms - 1):
            raise Hint("this counts A against B and B against A.")
        if given != math.comb(arms, 2):
            raise Hint(f"of {arms} arms it should not be {given:g}: every two of them, once.")


# 13 · The tinker SDK


@exercise(
    "13.1",
    right="the last prompt token's target is the first of the answer, so the weights begin one place early.",
)
def target_weights(answer: Any) -> None:
    given = numbers_in(answer)
    if given == [0, 0, 0, 1, 1]:
        raise Hint("these are the weights of the five tokens. The first is nobody's target.")
    if given == [0, 0, 0, 1]:
        raise Hint("targets are shifted by one, and their weights with them.")
    if given != [0, 0, 1, 1]:
        raise Hint("there are four targets: which of them are the prompt's, and which the answer's?")


@exercise("13.2", right="a sum grows with the length of a batch; a mean can be compared between batches.")
def loss_per_token(answer: Any) -> None:
    for loss, weights in ((12.0, [0.0, 0.0, 1.0, 1.0]), (9.0, [1.0, 1.0, 1.0]), (3.0, [0.0, 1.0])):
        given = number_in(called(answer, loss, list(weights)))
        if near(given, loss / len(weights)) and not near(given, loss / sum(weights)):
            raise Hint("a target of weight 0 is no part of the sum, and does not count.")
        if not near(given, loss / sum(weights)):
            raise Hint(f"at a sum of {loss:g} and the weights {weights} it should not be {given:.4g}.")
