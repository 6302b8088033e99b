# frozen_string_literal: true

require_relative "test_helper"

class RunTest < ClientTest
  ANSWER = { "ok" => true, "result" => { "a" => [1] }, "duration_ms" => 12, "stop_reason" => "end_turn" }.freeze
  STATE = { "run_id" => "0a", "status" => "running", "model" => "opus", "queued_at" => 1, "started_at" => 2,
            "finished_at" => nil, "duration_ms" => nil, "result" => nil, "error" => nil, "stop_reason" => nil,
            "input_tokens" => nil, "output_tokens" => nil, "cost_usd" => nil }.freeze

  def test_a_run_sends_the_defaults_and_nothing_that_was_not_given
    answers(:post, "/run", ANSWER)
    result = client.run(prompt: "hi")
    assert_equal Clawdforge::RunResult.new(ok: true, result: { "a" => [1] }, duration_ms: 12, stop_reason: "end_turn"), result
    assert_requested :post, "#{URL}/run",
                     body: { prompt: "hi", model: "sonnet", timeout_secs: 120 },
                     headers: { "Authorization" => "Bearer #{TOKEN}", "Content-Type" => "application/json" }
  end

  def test_a_run_sends_what_was_given
    answers(:post, "/run", ANSWER)
    client.run(prompt: "hi", model: "opus", system: "", files: ["ff_1", Clawdforge::FileToken.new(file_token: "ff_2")], timeout_secs: 9)
    assert_requested :post, "#{URL}/run",
                     body: { prompt: "hi", model: "opus", system: "", files: %w[ff_1 ff_2], timeout_secs: 9 }
  end

  def test_the_client_sets_the_defaults
    answers(:post, "/run", ANSWER)
    client(default_model: "haiku", default_timeout: 33).run(prompt: "hi")
    assert_requested :post, "#{URL}/run", body: { prompt: "hi", model: "haiku", timeout_secs: 33 }
  end

  def test_any_text_goes_through_whole
    answers(:post, "/run", ANSWER)
    text = "-p \"ünï\" \u2028 </script> 🦊\u0000\n"
    client.run(prompt: text)
    client.run(prompt: text.encode("UTF-16LE"))
    assert_requested(:post, "#{URL}/run", times: 2) { |request| JSON.parse(request.body)["prompt"] == text }
  end

  def test_results_are_what_the_reply_was_and_unknown_keys_are_ignored
    deep = JSON.parse("#{"[" * 150}1#{"]" * 150}", max_nesting: false)
    ["text", "12", [1, "ü"], { "k" => nil }, deep].each do |value|
      answers(:post, "/run", JSON.generate(ANSWER.merge("result" => value, "later" => 1), max_nesting: false))
      assert_equal value, client.run(prompt: "hi").result
    end
  end

  def test_a_run_in_the_background
    answers(:post, "/run", STATE.merge("status" => "queued"), status: 202)
    state = client.submit(prompt: "hi", model: "opus", timeout_secs: 300)
    assert_equal ["0a", false, 1, nil], [state.run_id, state.done?, state.queued_at, state.result]
    assert_requested(:post, "#{URL}/run", body: { prompt: "hi", model: "opus", timeout_secs: 300 },
                                          headers: { "Prefer" => "respond-async" }) { |request| !request.headers.key?("Idempotency-Key") }
    over = { "status" => "succeeded", "result" => { "a" => 1 }, "cost_usd" => 0.5, "later" => 1 }
    [[{}, false, nil], [over, true, { "a" => 1 }], [{ "status" => "failed" }, true, nil]].each do |news, done, result|
      answers(:get, "/runs/0%2Fa", STATE.merge(news))
      state = client.get_run("0/a")
      assert_equal [STATE.merge(news)["status"], done, result], [state.status, state.done?, state.result]
    end
    [false, true].each do |over_before|
      answers(:delete, "/runs/0a", { "ok" => true, "run_id" => "0a", "already_over" => over_before })
      assert_equal !over_before, client.cancel("0a")
    end
  end

  def test_another_agent_has_its_own_model_and_permissions
    answers(:post, "/run", ANSWER.merge(STATE, "agent" => "gemini", "model" => nil))
    asked = { prompt: "hi", agent: "gemini", timeout_secs: 120 }
    client.run(prompt: "hi", agent: "gemini", permissions: "approve-all")
    # Said without need, for the server to refuse.
    client.run(prompt: "hi", agent: "claude", permission_timeout_secs: 5)
    state = client.submit(prompt: "hi", agent: "gemini", model: "pro", ask: true, permission_timeout_secs: 20)
    assert_equal ["gemini", nil], [state.agent, state.model]
    [{ permissions: "approve-all" }, { agent: "claude", model: "sonnet", permission_timeout_secs: 5 },
     { model: "pro", permissions: "ask", permission_timeout_secs: 20 }].each do |more|
      assert_requested :post, "#{URL}/run", body: asked.merge(more), times: 1
    end
    assert_raises(ArgumentError) { client.run(prompt: "hi", permision: "ask") }
  end

  def test_a_key_and_a_schema_are_sent
    schema = { "type" => "object" }
    answers(:post, "/run", ANSWER.merge(STATE))
    client.run(prompt: "hi", schema: schema, idempotency_key: "k-1")
    client.submit(prompt: "hi", schema: schema, idempotency_key: "k-2")
    body = { prompt: "hi", model: "sonnet", timeout_secs: 120, schema: schema }
    %w[k-1 k-2].each { |key| assert_requested :post, "#{URL}/run", body: body, headers: { "Idempotency-Key" => key }, times: 1 }
  end

  def test_a_key_or_an_id_that_is_none_is_refused_before_anything_is_sent
    ["", "a b", "ü", "k\n", "k" * 256].each do |key|
      assert_raises(ArgumentError) { client.run(prompt: "hi", idempotency_key: key) }
      assert_raises(ArgumentError) { client.run(prompt: "hi", idempotency_key: key, stream: true) }
      assert_raises(ArgumentError) { client.submit(prompt: "hi", idempotency_key: key) }
      assert_raises(ArgumentError) { client.create_session(idempotency_key: key) }
    end
    [:get_run, :cancel].each { |call| assert_raises(ArgumentError) { client.public_send(call, "") } }
    assert_not_requested :any, /./
  end

  def test_an_empty_prompt_is_refused_before_anything_is_sent
    ["", nil].each { |prompt| assert_raises(ArgumentError) { client.run(prompt: prompt) } }
    assert_raises(ArgumentError) { client.run }
    assert_not_requested :any, /./
  end

  def test_what_is_no_json_is_refused_before_anything_is_sent
    error = assert_raises(ArgumentError) { client.run(prompt: "\xFF") }
    assert_match(/JSON/, error.message)
    assert_raises(ArgumentError) { client.session(meta: { "a" => Float::NAN }) }
    assert_not_requested :any, /./
  end
end
