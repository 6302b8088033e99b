# frozen_string_literal: true

require_relative "test_helper"

class SessionTest < ClientTest
  CREATED = { "ok" => true, "session_id" => "abc", "agent" => "claude", "model" => nil, "cwd" => "/data/s/abc",
              "created_at" => 1_714_392_000, "meta" => nil }.freeze
  STATE = { "session_id" => "abc", "agent" => "claude", "model" => "opus", "cwd" => "/data/s/abc", "created_at" => 5,
            "last_turn_at" => 7, "turn_count" => 1, "closed_at" => nil, "live" => true, "meta" => { "k" => 1 },
            "permissions" => "approve-all" }.freeze
  TURN = { "ok" => true, "session_id" => "abc", "turn_index" => 1, "stop_reason" => "end_turn", "duration_ms" => 9,
           "text" => "ignored", "events" => [
             { "jsonrpc" => "2.0", "type" => "protocol" },
             { "type" => "thinking", "content" => "hm" },
             { "type" => "text", "content" => "one " },
             { "type" => "tool_call", "name" => "Bash", "args" => { "command" => "ls" }, "result" => "a", "status" => "completed" },
             { "type" => "text", "content" => "two" }
           ] }.freeze

  def setup
    super
    answers(:post, "/sessions", CREATED)
    @deleted = answers(:delete, "/sessions/abc", { "ok" => true, "session_id" => "abc", "already_closed" => false })
    answers(:post, "/sessions/abc/turn", TURN)
  end

  def test_create_session_sends_only_what_was_given
    session = client.create_session
    assert_equal ["abc", "claude", 1_714_392_000, "/data/s/abc", false],
                 [session.id, session.agent, session.created_at, session.cwd, session.closed?]
    client.create_session(agent: "codex", model: "opus", meta: { "for" => nil })
    assert_requested :post, "#{URL}/sessions", body: { agent: "claude" }
    assert_requested :post, "#{URL}/sessions", body: { agent: "codex", model: "opus", meta: { for: nil } }
    assert_not_requested @deleted
  end

  def test_without_a_block_the_session_stays_open
    assert_instance_of Clawdforge::Session, client.session(model: "opus")
    assert_requested :post, "#{URL}/sessions", body: { agent: "claude", model: "opus" }
    assert_not_requested @deleted
  end

  def test_a_turn
    session = client.session
    turn = session.turn("hi")
    assert_equal [true, "abc", 1, "end_turn", 9], [turn.ok, turn.session_id, turn.turn_index, turn.stop_reason, turn.duration_ms]
    assert_equal "one two", turn.text
    assert_equal %w[protocol thinking text tool_call text], turn.events.map(&:type)
    assert_equal Clawdforge::TurnEvent.new(type: "tool_call", name: "Bash", args: { "command" => "ls" }, result: "a"), turn.events[3]
    session.turn("more", files: ["ff_1"], timeout_secs: 60)
    assert_requested :post, "#{URL}/sessions/abc/turn", body: { prompt: "hi" }
    assert_requested :post, "#{URL}/sessions/abc/turn", body: { prompt: "more", files: ["ff_1"], timeout_secs: 60 }
  end

  def test_keys_are_sent
    client.create_session(idempotency_key: "k-1").turn("hi", idempotency_key: "k-2")
    assert_requested :post, "#{URL}/sessions", headers: { "Idempotency-Key" => "k-1" }
    assert_requested :post, "#{URL}/sessions/abc/turn", headers: { "Idempotency-Key" => "k-2" }
  end

  def test_cancelling
    answers(:post, "/sessions/abc/cancel", { "ok" => true, "session_id" => "abc", "cancelled" => 2 })
    assert_equal 2, client.session.cancel
  end

  def test_an_empty_prompt_or_id_is_refused_before_anything_is_sent
    session = client.session
    ["", nil].each do |empty|
      assert_raises(ArgumentError) { session.turn(empty) }
      assert_raises(ArgumentError) { client.get_session(empty) }
    end
    assert_requested :any, /./, times: 1
  end

  def test_states
    answers(:get, "/sessions/abc", STATE)
    answers(:get, "/sessions?include_closed=true", { "sessions" => [STATE, STATE.merge("session_id" => "def")], "count" => 2 })
    answers(:get, "/sessions?include_closed=false", { "sessions" => [], "count" => 0 })
    state = client.get_session("abc")
    assert_equal STATE.values.first(10), state.to_a
    assert_equal state, client.session.state
    assert_equal %w[abc def], client.list_sessions.map(&:session_id)
    assert_equal [], client.list_sessions(include_closed: false)
  end

  def test_ids_are_escaped
    asked = answers(:get, "/sessions/a%2Fb%3F%C3%BC%20%25", STATE)
    client.get_session("a/b?ü %")
    assert_requested asked
  end

  def test_close_sends_one_request
    session = client.session
    3.times { assert_nil session.close }
    assert_predicate session, :closed?
    assert_requested @deleted, times: 1
  end

  def test_threads_that_close_at_once_send_one_request
    session = client.session
    asked = stub_request(:delete, "#{URL}/sessions/abc").to_return { sleep(0.05) && { body: "{}" } }
    Array.new(4) { Thread.new { session.close } }.each(&:join)
    assert_requested asked, times: 1
  end

  def test_a_close_that_failed_can_be_tried_again
    session = client.session
    stub_request(:delete, "#{URL}/sessions/abc").to_raise(Errno::ECONNRESET).then.to_return(body: "{}")
    assert_raises(Clawdforge::TransportError) { session.close }
    refute_predicate session, :closed?
    2.times { session.close }
    assert_predicate session, :closed?
    assert_requested :delete, "#{URL}/sessions/abc", times: 2
  end

  def test_a_session_that_is_gone_can_not_be_closed
    answers(:delete, "/sessions/abc", { "detail" => "There is nothing here." }, status: 404)
    session = client.session
    assert_equal 404, assert_raises(Clawdforge::APIError) { session.close }.status
    refute_predicate session, :closed?
  end

  def test_a_turn_after_close_is_not_sent
    session = client.session
    session.close
    error = assert_raises(Clawdforge::ClosedSessionError) { session.turn("hi") }
    assert_kind_of Clawdforge::Error, error
    assert_includes error.message, "abc"
    assert_not_requested :post, "#{URL}/sessions/abc/turn"
  end

  def test_a_block_closes_and_gives_its_value
    inside = nil
    value = client.session(agent: "claude") do |session|
      inside = session
      refute_predicate session, :closed?
      session.turn("hi").text
    end
    assert_equal "one two", value
    assert_predicate inside, :closed?
    assert_requested @deleted, times: 1
  end

  def test_a_block_that_closes_by_itself_closes_once
    client.session(&:close)
    assert_requested @deleted, times: 1
  end

  def test_a_block_closes_after_its_error_whatever_it_is
    [RuntimeError, Interrupt, NotImplementedError].each do |kind|
      assert_raises(kind) { client.session { raise kind, "mine" } }
    end
    assert_requested @deleted, times: 3
  end

  def test_a_block_closes_when_it_is_left
    assert_equal 5, client.session { break 5 }
    assert_equal 6, catch(:out) { client.session { throw :out, 6 } }
    assert_requested @deleted, times: 2
  end

  def test_an_error_from_closing_never_masks_the_blocks_own
    stub_request(:delete, "#{URL}/sessions/abc").to_raise(Errno::ECONNRESET).then.to_return(status: 500)
    [RuntimeError, RuntimeError, Interrupt].each do |kind|
      error = assert_raises(kind) { client.session { raise kind, "mine" } }
      assert_equal ["mine", nil], [error.message, error.cause]
    end
    assert_requested :delete, "#{URL}/sessions/abc", times: 3
  end

  def test_an_error_from_closing_alone_is_raised
    answers(:delete, "/sessions/abc", { "detail" => "no" }, status: 500)
    assert_raises(Clawdforge::APIError) { client.session { 1 } }
    assert_raises(Clawdforge::APIError) { client.session { break } }
    # One that is being handled around the block is not the block's.
    begin
      raise "earlier"
    rescue RuntimeError
      assert_raises(Clawdforge::APIError) { client.session { 1 } }
    end
  end

  def test_a_session_that_was_not_created_runs_no_block
    answers(:post, "/sessions", { "detail" => "full" }, status: 503)
    assert_raises(Clawdforge::APIError) { client.session { flunk } }
    assert_not_requested @deleted
  end

  def test_a_session_does_not_show_the_token
    session = client.session
    assert_includes session.inspect, "abc"
    refute_includes shown(session), TOKEN
  end
end
