"""A chat with real models, embedded and behind a server: the queue, the context, and what thumbs teach."""

import threading

import pytest

import tensafe_nb as tn
from tensafe_nb.data.labels import encode_prompt


def test_columns_answer_as_the_clients_sample_and_the_pieces_are_the_answer(
    service: tn.ServiceClient, tc: tn.TrainingClient
) -> None:
    other = service.create_training_client(lora_config={"rank": 2}, seed=9)
    chat = tn.chat(base=tc, other=other, max_new_tokens=8, seed=4, system="Be brief.")
    reply = chat.say("abs(x, /)").result()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abs(x, /)"}]
    assert reply.texts["base"] == tc.sample([messages], max_new_tokens=8, seed=4).texts[0]
    assert chat.messages == [*messages, {"role": "assistant", "content": reply.text}]
    (answer,) = chat._turns[0].answers[0]
    assert "".join(text for text, _ in answer.pieces) == reply.text and len(answer.pieces) > 1
    assert all(logprob <= 0 for _, logprobs in answer.pieces for logprob in logprobs)


@pytest.mark.transports("embedded", soak="http")
def test_turns_that_do_not_fit_are_left_out_oldest_first_and_a_last_one_gets_the_room_there_is(
    tc: tn.TrainingClient,
) -> None:
    chat = tc.chat(max_new_tokens=16, ignore_end=True)
    for _ in range(4):
        chat.say("word " * 60).result()
    left_out = [turn.answers[0][0].left_out for turn in chat._turns]
    assert left_out[0] == 0 and 0 < left_out[-1] < 4 and left_out == sorted(left_out)
    kept = chat.messages[:-1][2 * left_out[-1] :]
    assert len(encode_prompt(tc.tokenizer, tuple(kept))) <= tc.context - 16  # type: ignore[operator]
    chat.clear()
    chat.sampling = tn.SamplingConfig(max_new_tokens=4000, ignore_end=True)
    reply = chat.say("word " * 220).result()
    assert reply.text and reply.finish_reason == "fixed"
    assert "more than the model's context" in str(chat.say("word " * 600).exception())


def test_a_chat_waits_for_its_turn_and_a_stop_frees_the_queue(tc: tn.TrainingClient) -> None:
    chat = tc.chat(max_new_tokens=400, ignore_end=True)
    tc.ready().result()
    reply = chat.say("def ")
    began = threading.Event()
    forget = chat.watch(lambda: began.set() if chat.messages[-1]["role"] == "assistant" else None)
    assert began.wait(60)
    forget()
    after = tc.sample("x", max_new_tokens=1)
    assert chat.stop() == 1
    assert reply.result().finish_reason == "stopped" and len(after.result().texts) == 1
    assert chat.messages[-1]["content"] == reply.text


def test_a_closed_client_says_so_and_the_other_goes_on(
    service: tn.ServiceClient, tc: tn.TrainingClient
) -> None:
    gone = service.create_training_client(model_ref="builtin:tiny", lora_config={"rank": 2})
    gone.ready().result()
    chat = tn.chat(gone=gone, here=tc, max_new_tokens=3, ignore_end=True)
    gone.close()
    reply = chat.say("hello").result()
    assert reply.finish_reasons == {"gone": "failed", "here": "fixed"} and "closed" in reply.errors["gone"]
    assert "closed" in chat.speakers[0].trouble and not chat.speakers[1].trouble


@pytest.mark.transports("embedded", soak="http")
@pytest.mark.parametrize("loss", ["dpo", pytest.param("ipo", marks=pytest.mark.soak)])
def test_thumbs_are_rows_that_the_pair_losses_learn_from(tc: tn.TrainingClient, loss: str) -> None:
    chat = tc.chat(max_new_tokens=6, seed=1, ignore_end=True)
    for said in ("abs(x, /)", "len(obj, /)"):
        chat.say(said).result()
        chat.rate(True)
        chat.regenerate().result()
        chat.rate(False)
        chat.clear()
    rows = chat.rows
    assert len(rows) == 2
    margins = []
    for _ in range(6):
        (batch,) = tc.batches(rows)
        margins.append(tc.forward_backward(batch, loss).result().metrics["reward_margin"])
        tc.optim_step(learning_rate=3e-3)
    assert margins[-1] > margins[0]
