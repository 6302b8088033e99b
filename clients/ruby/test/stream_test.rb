# frozen_string_literal: true

require_relative "test_helper"
require "timeout"

# Streams, over the wire.
class StreamTest < ClientTest
  RUN = { "ok" => true, "result" => "héllo", "duration_ms" => 5, "stop_reason" => "end_turn" }.freeze
  TURN = { "ok" => true, "session_id" => "abc", "turn_index" => 2, "events" => [], "stop_reason" => "end_turn",
           "duration_ms" => 7 }.freeze
  FAILED = { "ok" => false, "error" => "overloaded", "stderr" => "", "duration_ms" => 1, "stop_reason" => "error" }.freeze
  PROBLEM = { "type" => "about:blank", "title" => "Busy", "status" => 503, "detail" => "Try again." }.freeze

  def setup
    super
    WebMock.disable!
    @server = TCPServer.new("127.0.0.1", 0)
    @asked = []
    @left = 0
    @slept = []
  end

  def teardown
    @serving&.kill&.join
    @server.close
    WebMock.enable!
    super
  end

  # Answers each request with the next of these: a status and a body, or the pieces of a stream. What follows its pieces is
  # :ends, :breaks (the connection), or :waits (for the client to leave).
  def serve(*answers)
    @serving&.join
    @serving = Thread.new { answers.each { |answer| answer(@server.accept, *answer) } }
  end

  def answer(socket, status, body, after = :ends)
    head = socket.gets("\r\n\r\n")
    sent = socket.read(head[/^Content-Length: (\d+)/i, 1].to_i)
    headers = head.lines[1..-2].to_h { |line| line.strip.split(": ", 2) }.transform_keys(&:downcase)
    @asked << [head.lines.first.delete_suffix(" HTTP/1.1\r\n"), headers, sent && !sent.empty? ? JSON.parse(sent) : nil]
    socket.write("HTTP/1.1 #{status} Status\r\nConnection: close\r\n")
    if body.is_a?(Hash)
      text = JSON.generate(body)
      return socket.write("Content-Length: #{text.bytesize}\r\n\r\n#{text}")
    end
    socket.write("X-Run-Id: 0a\r\nX-Turn: 2\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    body.each { |piece| piece.is_a?(Queue) ? piece.pop : socket.write("#{piece.bytesize.to_s(16)}\r\n#{piece}\r\n") }
    @left += 1 if after == :waits && socket.read.empty?
    socket.write("0\r\n\r\n") if after == :ends
  rescue Errno::ECONNRESET, Errno::EPIPE
    @left += 1 if after == :waits
  ensure
    socket.close
  end

  def frame(id, name, data, pretty: false)
    lines = (pretty ? JSON.pretty_generate(data) : JSON.generate(data)).lines(chomp: true).map { |line| "data: #{line}\n" }
    "#{"id: #{id}\n" if id}event: #{name}\n: a comment\n#{lines.join}\n"
  end

  def text(id, content)
    frame(id, "text", { "content" => content })
  end

  def requests
    @asked.map(&:first)
  end

  def wire_client(**options)
    client(base_url: "http://127.0.0.1:#{@server.addr[1]}", **options)
  end

  def unhurried(stream)
    slept = @slept
    stream.define_singleton_method(:sleep) { |secs| slept << secs }
    stream
  end

  def run_stream(key = nil, **options)
    unhurried(wire_client(**options).run(prompt: "hi", stream: true, idempotency_key: key))
  end

  def test_what_an_agent_asks_is_answered_while_the_stream_goes_on
    question = frame(1, "permission_request", { "permission_id" => "p1" })
    [["allow", { "decision" => "allow" }], ["always", { "option_id" => "always" }],
     [{ decision: "deny", message: "No." }, { "decision" => "deny", "message" => "No." }]].each do |given, sent|
      serve([200, [question, frame(2, "result", RUN)]], [410, { "status" => 410, "detail" => "It is over." }])
      asked = []
      result = wire_client.run(prompt: "hi", permission_timeout_secs: 10, on_permission: ->(it) { asked << it && given })
      assert_equal ["héllo", ["p1"]], [result.result, asked.map { |it| it["permission_id"] }]
      assert_equal ["ask", 10], @asked[-2].last.values_at("permissions", "permission_timeout_secs")
      assert_equal ["POST /runs/0a/permissions/p1", sent], [@asked.last.first, @asked.last.last]
    end
  end

  def test_a_callback_that_raises_cancels_the_work
    serve([200, [frame(1, "permission_request", { "permission_id" => "p1" })], :waits], [200, { "ok" => true }])
    assert_raises(KeyError) { wire_client.run(prompt: "hi", on_permission: ->(_) { raise KeyError, "no" }) }
    @serving.join
    assert_equal ["POST /run", "DELETE /runs/0a"], @asked.map(&:first)
  end

  def test_an_answer_that_is_not_taken_cancels_the_work
    serve([200, [frame(1, "permission_request", { "permission_id" => "p/1" })]],
          [422, { "status" => 422, "detail" => "The question does not offer that." }], [200, { "ok" => true }])
    error = assert_raises(Clawdforge::APIError) { wire_client.run(prompt: "hi", on_permission: ->(_) { "always" }) }
    @serving.join
    assert_equal [422, ["POST /run", "POST /runs/0a/permissions/p%2F1", "DELETE /runs/0a"]], [error.status, @asked.map(&:first)]
  end

  def test_a_stream_in_pieces_of_any_size
    whole = ": heartbeat\n\n#{text(1, "hé")}#{frame(2, "tool_call", { "name" => "Bash", "args" => { "a" => "\n" } }, pretty: true)}" \
            ":\n\n#{frame(3, "text", { "content" => "llo" }, pretty: true)}#{frame(nil, "gap", { "detail" => "Some are missing." })}" \
            "#{frame(4, "result", RUN, pretty: true)}"
    [1, 7, whole.bytesize].each do |size|
      serve([200, whole.bytes.each_slice(size).map { |bytes| bytes.pack("C*") }])
      stream = run_stream
      assert_equal [nil, nil], [stream.id, stream.result]
      events = stream.to_a
      assert_equal %w[text tool_call text gap result], events.map(&:name)
      assert_equal [1, 2, 3, 3, 4], events.map(&:id)
      assert_equal "héllo", events.map(&:text).join
      assert_equal({ "name" => "Bash", "args" => { "a" => "\n" } }, events[1].data)
      assert_equal [RUN, Clawdforge::RunResult.new(**RUN), "0a"], [events.last.data, stream.result, stream.id]
    end
    assert_equal ["POST /run"] * 3, requests
    _, headers, body = @asked.first
    assert_equal ["text/event-stream", "Bearer #{TOKEN}"], headers.values_at("accept", "authorization")
    assert_equal({ "prompt" => "hi", "model" => "sonnet", "timeout_secs" => 120 }, body)
    keys = @asked.map { |asked| asked[1]["idempotency-key"] }
    assert_equal 3, keys.grep(/\A\h{8}(-\h{4}){3}-\h{12}\z/).uniq.size
  end

  def test_events_come_as_they_happen
    seen = Queue.new
    serve([200, [text(1, "first"), seen, frame(2, "result", RUN)]])
    result = wire_client.run(prompt: "hi", idempotency_key: "mine") { |event| seen << event.text }
    assert_equal ["héllo", "mine"], [result.result, @asked[0][1]["idempotency-key"]]
  end

  def test_a_stream_that_is_read_again_has_the_same_key
    2.times { serve([200, [text(1, "a"), frame(2, "result", RUN)]]) && assert_equal([1, 2], (@stream ||= run_stream).map(&:id)) }
    assert_equal 1, @asked.map { |asked| asked[1]["idempotency-key"] }.uniq.size
  end

  def test_a_broken_connection_is_taken_up_with_nothing_lost_or_doubled
    third = text(3, "c")
    serve([200, [text(1, "a"), text(2, "b"), third[0, 20]], :breaks],
          [200, [third.chop], :breaks],
          [200, [":\n\n"]],
          [200, [third], :breaks],
          [200, [": nothing yet\n\n"], :breaks],
          [200, [text(4, "d"), frame(5, "result", RUN)], :breaks])
    stream = run_stream
    assert_equal [[1, "a"], [2, "b"], [3, "c"], [4, "d"], [5, ""]], stream.map { |event| [event.id, event.text] }
    assert_equal "héllo", stream.result.result
    assert_equal ["POST /run"] + (["GET /runs/0a/events"] * 5), requests
    assert_equal [nil, "2", "2", "2", "3", "3"], @asked.map { |asked| asked[1]["last-event-id"] }
    assert_equal [0, 1, 2, 0, 1], @slept
  end

  def test_one_that_breaks_again_and_again_is_given_up
    gap = [200, [frame(nil, "gap", { "detail" => "Some are missing." })]]
    serve([200, [text(1, "a")], :breaks], [200, [":\n\n"], :breaks], gap, gap)
    error = assert_raises(Clawdforge::TransportError) { run_stream.to_a }
    assert_match(/the stream ended before its result/, error.message)
    assert_instance_of EOFError, error.cause
    assert_equal ["POST /run"] + (["GET /runs/0a/events"] * 3), requests
    serve([200, [text(1, "a")], :breaks], [404, PROBLEM.merge("status" => 404)])
    assert_equal 404, assert_raises(Clawdforge::APIError) { run_stream.to_a }.status
    assert_equal 6, requests.size
  end

  def test_a_failure_is_raised_as_without_a_stream
    [[FAILED, 502], [PROBLEM, 503]].each do |data, status|
      serve([200, [text(1, "a"), frame(2, "agent_error", {}), frame(3, "error", data)]])
      names = []
      error = assert_raises(Clawdforge::APIError) { run_stream.each { |event| names << event.name } }
      assert_equal [status, data, %w[text agent_error]], [error.status, error.body, names]
    end
    serve([401, PROBLEM], [200, RUN])
    assert_raises(Clawdforge::AuthError) { run_stream.to_a }
    assert_match(/no stream/, assert_raises(Clawdforge::APIError) { run_stream.to_a }.message)
    assert_equal ["POST /run"] * 4, requests
  end

  def test_whoever_leaves_cancels
    uri = URI("http://127.0.0.1:#{@server.addr[1]}")
    # What is an error of the connection below is the caller's own here.
    own = [KeyError, EOFError, Interrupt, Clawdforge::TransportError, Clawdforge::APIError]
    ways = own.map { |kind| -> { assert_equal "mine", assert_raises(kind) { run_stream.each { raise kind, "mine" } }.message } }
    ways << -> { assert_equal 5, wire_client.run(prompt: "hi") { break 5 } }
    ways << -> { assert_equal "a", run_stream.first.text }
    ways << -> { assert_equal 6, catch(:out) { run_stream.each { throw :out, 6 } } }
    ways << -> { assert_raises(Timeout::Error) { Timeout.timeout(0.3) { run_stream.each { next } } } }
    ways << -> { Net::HTTP.start(uri.host, uri.port) { |http| run_stream(http_client: http).first } }
    ways.each_with_index do |way, index|
      @asked.clear
      serve([200, [text(1, "a")], :waits], [200, { "ok" => true, "run_id" => "0a", "already_over" => false }])
      way.call
      @serving.join
      assert_equal ["POST /run", "DELETE /runs/0a"], requests, index
    end
    assert_equal ways.size, @left
  end

  def test_whoever_leaves_at_the_end_does_not
    serve([200, [frame(1, "result", RUN)]], [200, [frame(1, "error", FAILED)]])
    run_stream.first
    assert_raises(Clawdforge::APIError) { run_stream.first }
    assert_equal ["POST /run"] * 2, requests
  end

  def test_a_stream_that_was_not_read_sends_nothing
    stream = run_stream
    assert_instance_of Enumerator, stream.each
    refute_includes shown(stream), TOKEN
    assert_raises(ArgumentError) { wire_client.run(prompt: "", stream: true) }
    assert_empty @asked
  end

  def test_a_turn
    serve([200, { "session_id" => "abc" }],
          [200, [text(1, "a")], :breaks],
          [200, [frame(2, "thinking", { "type" => "thinking", "content" => "hm" }), frame(3, "result", TURN)]],
          [200, [text(1, "a")], :waits],
          [200, { "ok" => true, "session_id" => "abc", "cancelled" => 1 }])
    session = wire_client.session
    stream = unhurried(session.turn("hi", stream: true, timeout_secs: 60))
    assert_equal [%w[text a], ["thinking", ""], ["result", ""]], stream.map { |event| [event.name, event.text] }
    assert_equal ["2", 2], [stream.id, stream.result.turn_index]
    assert_equal "a", session.turn("hi") { |event| break event.text }
    @serving.join
    assert_equal ["POST /sessions", "POST /sessions/abc/turn", "GET /sessions/abc/turns/2/events", "POST /sessions/abc/turn",
                  "DELETE /sessions/abc/turns/2"], requests
    assert_equal({ "prompt" => "hi", "timeout_secs" => 60 }, @asked[1].last)
  end
end
