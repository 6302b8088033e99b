# frozen_string_literal: true

require "minitest/autorun"
require "open3"
require "rbconfig"
require "securerandom"
require "tempfile"
require "clawdforge"

# The client against a real server, whose model is a stub: tests/with-demo.sh starts one.
class LiveTest < Minitest::Test
  URL = ENV.fetch("CLAWDFORGE_URL")
  TOKEN = ENV.fetch("CLAWDFORGE_TOKEN")
  ADMIN_TOKEN = ENV.fetch("CLAWDFORGE_ADMIN_TOKEN")

  def client(token: TOKEN, **options)
    Clawdforge::Client.new(base_url: URL, token: token, **options)
  end

  def admin
    client(token: ADMIN_TOKEN)
  end

  def stub(**directive)
    "Please.\nstub: #{JSON.generate(directive)}"
  end

  def refused(status, kind = Clawdforge::APIError, &call)
    error = assert_raises(kind, &call)
    assert_equal status, error.status
    [TOKEN, ADMIN_TOKEN].each { |token| refute_includes error.full_message, token }
    error
  end

  def test_healthz
    assert_equal [true, true, true], client(token: "none").healthz.values_at("ok", "claude_present", "acpx_present")
  end

  def test_a_run_gives_text
    run = client.run(prompt: stub(text: "-p héllo 🦊"))
    assert_equal [true, "-p héllo 🦊", "end_turn"], [run.ok, run.result, run.stop_reason]
    assert_operator run.duration_ms, :>, 0
  end

  def test_a_run_gives_a_value
    assert_equal({ "a" => [1, nil] }, client.run(prompt: stub(text: "```json\n{\"a\": [1, null]}\n```")).result)
    assert_equal [1, 2], client.run(prompt: stub(text: "[1, 2]")).result
    assert_equal "12", client.run(prompt: stub(text: "12")).result
  end

  def test_a_runs_model_and_system_reach_the_model
    asked = client.run(prompt: stub(echo: true), model: "opus", system: "Speak like a heron.").result
    assert_match(/opus/, asked["model"])
    assert_includes JSON.generate(asked["system"]), "Speak like a heron."
    assert_match(/haiku/, client(default_model: "haiku").run(prompt: stub(echo: true)).result["model"])
  end

  def test_a_run_is_watched
    said = "A heron stands in the water, grey and héron-like, until it doesn't."
    times = []
    stream = client.run(prompt: stub(text: said, pace_ms: 50), stream: true)
    events = stream.each_entry.map { |event| event.tap { times << Process.clock_gettime(Process::CLOCK_MONOTONIC) } }
    texts = events.select { |event| event.name == "text" }
    assert_equal said, texts.map(&:text).join
    assert_operator texts.size, :>, 2
    assert_operator times[texts.size - 1] - times.first, :>, 0.1
    assert_equal (1..events.size).to_a, events.map(&:id)
    assert_equal ["result", said, said], [events.last.name, stream.result.result, client.get_run(stream.id).result]
    assert_equal events, stream.to_a
    refused(502) { client.run(prompt: stub(error: 401)) { next } }
    refused(422) { client.run(prompt: "hi", timeout_secs: 1) { flunk } }
  end

  def test_a_run_that_is_left_is_cancelled
    stream = client.run(prompt: stub(text: "long " * 100, pace_ms: 200), stream: true)
    assert_equal "text", stream.first.name
    state = client.get_run(stream.id)
    assert_equal ["cancelled", true, "cancelled"], [state.status, state.done?, state.stop_reason]
  end

  def test_a_run_in_the_background
    key = SecureRandom.uuid
    state = client.submit(prompt: stub(text: "[1, 2]"), idempotency_key: key)
    assert_equal state.run_id, client.submit(prompt: stub(text: "[1, 2]"), idempotency_key: key).run_id
    state = client.get_run(state.run_id) while !state.done? && sleep(0.05)
    assert_equal ["succeeded", [1, 2], nil], [state.status, state.result, state.error]
    assert_equal false, client.cancel(state.run_id)
    long = client.submit(prompt: stub(delay_ms: 20_000))
    assert_equal true, client.cancel(long.run_id)
    assert_equal "cancelled", client.get_run(long.run_id).status
  end

  def test_a_key_runs_once
    key = SecureRandom.uuid
    first = client.run(prompt: "Say hello.", idempotency_key: key)
    assert_equal first, client.run(prompt: "Say hello.", idempotency_key: key)
    assert_equal(first, client.run(prompt: "Say hello.", idempotency_key: key) { next })
    refused(422) { client.run(prompt: "Say something else.", idempotency_key: key) }
  end

  def test_an_upload_is_there_for_a_run_and_a_turn
    upload = Tempfile.create("upload") do |file|
      file.write("green heron\n")
      file.close
      client.upload_file(file.path, ttl_secs: 60, filename: "my \"birds\" ü.txt", content_type: "text/plain")
    end
    assert_equal [60, 12], [upload.ttl_secs, upload.size]
    asked = client.run(prompt: stub(echo: true), files: [upload]).result
    assert_includes JSON.generate(asked["messages"]), ".txt"
    client.session do |session|
      cat = { name: "Bash", input: { command: "ls; cat my*", description: "d" } }
      turn = session.turn(stub(tool: cat), files: [upload.file_token])
      listing = turn.text
      assert_match(/birds.*ü\.txt/, listing)
      assert_match(/birds.*ü\.txt/, turn.files.first)
      assert_includes listing, "green heron"
    end
  end

  def test_uploads_from_an_io_and_a_pipe
    io = StringIO.new("skipped,12345")
    io.pos = 8
    assert_equal 5, client.upload_file(io).size
    reader, writer = IO.pipe
    sender = Thread.new { writer.write("x" * 300_000).tap { writer.close } }
    assert_equal 300_000, client.upload_file(reader).size
    sender.join
    assert_equal 0, client.upload_file(StringIO.new("")).size
  end

  def test_an_upload_over_the_limit_or_with_a_bad_ttl
    Tempfile.create("sparse") do |file|
      file.truncate((100 << 20) + 1)
      assert_match(/at most \d+ bytes/, refused(413) { client.upload_file(file.path) }.message)
    end
    assert_match(/ttl_secs/, refused(400) { client.upload_file(StringIO.new("x"), ttl_secs: 5) }.message)
  end

  def test_a_failed_run_is_a_502_with_its_cause
    error = refused(502) { client.run(prompt: stub(error: 401)) }
    assert_match(/\AHTTP 502: .*401/, error.message)
    assert_equal [false, "error"], error.body.values_at("ok", "stop_reason")
  end

  def test_a_run_out_of_time_is_a_502
    error = refused(502) { client.run(prompt: stub(delay_ms: 20_000), timeout_secs: 5) }
    assert_equal "timeout", error.body["stop_reason"], error.body.inspect
  end

  def test_auth
    assert_match(/\AHTTP 401: .*token/, refused(401, Clawdforge::AuthError) { client(token: "cf_none").run(prompt: "hi") }.message)
    refused(401, Clawdforge::AuthError) { client(token: "").list_sessions }
    refused(403, Clawdforge::AuthError) { admin.run(prompt: "hi") }
    refused(403, Clawdforge::AuthError) { client.list_tokens }
  end

  def test_bad_input
    error = refused(422) { client.run(prompt: "hi", model: "no such model", timeout_secs: 4) }
    assert_match(%r{\AHTTP 422: .*/model: .*/timeout_secs: }, error.message)
    refused(422) { client.run(prompt: "hi", timeout_secs: -1000) }
    assert_match(%r{/agent: }, refused(422) { client.session(agent: "nobody") }.message)
    assert_match(/ff_none/, refused(400) { client.run(prompt: "hi", files: ["ff_none"]) }.message)
  end

  def test_what_is_not_there
    ["0" * 32, "no/such?id", "ü"].each { |id| refused(404) { client.get_session(id) } }
    refused(404) { admin.revoke_token("nobody") }
    refused(404) { client.get_run("0" * 32) }
    refused(404) { client.cancel("0" * 32) }
  end

  def test_a_session_of_two_turns_has_a_memory
    opened = client.session(model: "opus", meta: { "for" => "supper" }) do |session|
      assert_equal [true, "opus", { "for" => "supper" }, 0], session.state.to_h.values_at(:live, :model, :meta, :turn_count)
      first = session.turn("My name is Mio.\n#{stub(text: "Hello.")}")
      assert_equal [true, session.id, 1, "end_turn"], [first.ok, first.session_id, first.turn_index, first.stop_reason]
      assert_equal "Hello.", first.text
      second = session.turn(stub(echo: true), timeout_secs: 60)
      assert_equal 2, second.turn_index
      ["My name is Mio.", "Hello."].each { |said| assert_includes JSON.generate(JSON.parse(second.text)["messages"]), said }
      session
    end
    state = client.get_session(opened.id)
    assert_equal [opened.id, "claude", opened.cwd, opened.created_at, 2, false],
                 [state.session_id, state.agent, state.cwd, state.created_at, state.turn_count, state.live]
    assert_operator state.closed_at, :>=, state.last_turn_at
    assert_includes client.list_sessions, state
    refute_includes client.list_sessions(include_closed: false).map(&:session_id), opened.id
  end

  def test_a_tool_call
    client.session do |session|
      turn = session.turn(stub(tool: { name: "Bash", input: { command: "echo h''i", description: "d" } }))
      call = turn.events.find { |event| event.type == "tool_call" }
      assert_equal ["Bash", "echo h''i"], [call.name, call.args["command"]]
      assert_includes JSON.generate(call.result), "hi"
      assert_includes turn.text, "hi"
    end
  end

  def test_a_failed_turn_leaves_the_session_usable
    client.session do |session|
      error = refused(502) { session.turn(stub(error: 401)) }
      assert_match(/\AHTTP 502: ./, error.message)
      assert_equal "fine", session.turn(stub(text: "fine")).text
    end
  end

  def test_a_turn_is_watched
    said = "Plums ripen late, and quinces later still."
    client.session do |session|
      stream = session.turn(stub(text: said, pace_ms: 50), stream: true)
      events = stream.to_a
      assert_equal said, events.map(&:text).join
      assert_equal (1..events.size).to_a, events.map(&:id)
      assert_equal events[..-2].map { |event| event.data["type"] }, stream.result.events.map(&:type)
      assert_equal ["1", 1, said], [stream.id, stream.result.turn_index, stream.result.text]
      refused(502) { session.turn(stub(error: 400)) { next } }
    end
  end

  def test_a_turn_is_cancelled_and_the_session_goes_on
    long = stub(text: "long " * 100, pace_ms: 200)
    client.session do |session|
      session.turn(long) { |event| break unless event.text.empty? }
      assert_equal 0, session.cancel
      cancelled = 0
      error = refused(502) { session.turn(long) { |event| cancelled += session.cancel unless event.text.empty? } }
      assert_equal ["cancelled", 1], [error.body["stop_reason"], cancelled]
      assert_equal 1, session.turn("And now?").turn_index
    end
  end

  def test_an_agent_asks
    client.session(model: "haiku", permissions: "ask", permission_timeout_secs: 60) do |session|
      file = File.join(session.cwd, "a")
      questions = []
      allow = lambda do |question|
        questions << question
        assert_equal [question["permission_id"]], session.permissions.map { |open| open["permission_id"] }
        "allow"
      end
      turn = session.turn(stub(tool: { name: "Write", input: { file_path: file, content: "text" } }), on_permission: allow)
      assert_equal ["end_turn", 1, "text"], [turn.stop_reason, questions.size, File.read(file)]
      assert_equal "client", session.answer(questions.first["permission_id"], "allow")["by"]
    end
    tool = { name: "Bash", input: { command: "touch b", description: "test" } }
    run = client.run(prompt: stub(tool: tool), on_permission: ->(_) { { decision: "deny", message: "Not today." } })
    assert_includes run.result, "Not today."
  end

  def test_a_key_makes_one_turn
    key = SecureRandom.uuid
    client.session do |session|
      first = session.turn("hello", idempotency_key: key)
      assert_equal first, session.turn("hello", idempotency_key: key)
    end
  end

  def test_a_key_makes_one_session
    key = SecureRandom.uuid
    made = client.create_session(idempotency_key: key)
    assert_equal made.id, client.create_session(idempotency_key: key).id
    made.close
  end

  def test_a_schema_decides_what_the_result_is
    schema = { type: "object", properties: { n: { type: "integer" } }, required: ["n"], additionalProperties: false }
    answer = stub(tool: { name: "StructuredOutput", input: { n: 42 } })
    assert_equal({ "n" => 42 }, client.run(prompt: answer, schema: schema).result)
    assert_equal({ "n" => 42 }, client.run(prompt: answer, schema: schema) { next }.result)
    refused(422) { client.run(prompt: "hello", schema: { type: 5 }) }
  end

  def test_a_closed_session
    session = client.session
    2.times { session.close }
    assert_predicate session, :closed?
    assert_raises(Clawdforge::ClosedSessionError) { session.turn("hi") }
  end

  def test_a_session_that_was_closed_elsewhere
    session = client.session
    request = Net::HTTP::Delete.new("/sessions/#{session.id}", "Authorization" => "Bearer #{TOKEN}")
    uri = URI(URL)
    assert_equal "200", Net::HTTP.start(uri.host, uri.port) { |http| http.request(request) }.code
    assert_match(/closed/, refused(410) { session.turn("hi") }.message)
    refute_predicate session, :closed?
    session.close
    assert_predicate session, :closed?
  end

  def test_a_batch
    runs = Array.new(3) { |number| { custom_id: number.to_s, prompt: stub(text: "number #{number}") } }
    batch = client.batches.create(runs)
    sleep 0.1 until client.batches.get(batch.batch_id).done?
    results = client.batches.results(batch.batch_id).to_a
    assert_equal [1, 2, 3], results.map(&:seq)
    assert_equal runs.to_h { |run| [run[:custom_id], "number #{run[:custom_id]}"] }, results.to_h { |one| [one.custom_id, one.answer["result"]] }
    assert_equal results.drop(2), client.batches.results(batch.batch_id, after: 2).to_a
    assert_includes client.batches.list.map(&:batch_id), batch.batch_id
    assert_match(/line 2/, refused(422) { client.batches.create([{ prompt: "a" }, { prompt: "" }]) }.message)
    slow = client.batches.create([{ prompt: stub(delay_ms: 60_000) }] * 5)
    assert_equal ["cancelled", 5], client.batches.cancel(slow.batch_id).then { |one| [one.status, one.counts["cancelled"]] }
  end

  def test_another_apps_session_is_not_there
    name = "other-#{Process.pid}"
    session = client.session
    other = client(token: admin.create_token(name).token)
    refused(404) { other.get_session(session.id) }
  ensure
    session.close
    admin.revoke_token(name)
  end

  def test_tokens
    name = "live-#{Process.pid}"
    minted = admin.create_token(name, ip_cidrs: ["127.0.0.0/8", "10.0.0.0/8"])
    assert_equal [name, ["127.0.0.0/8", "10.0.0.0/8"]], [minted.name, minted.ip_cidrs]
    assert_equal [], client(token: minted.token).list_sessions
    listed = admin.list_tokens.find { |token| token.name == name }
    assert_equal [nil, minted.ip_cidrs, minted.created_at, true], [listed.token, listed.ip_cidrs, listed.created_at, listed.enabled]
    refute_includes minted.inspect, minted.token
    assert_match(/#{name}/, refused(409) { admin.create_token(name) }.message)
    assert_match(/300/, refused(422) { admin.create_token("#{name}-2", ip_cidrs: ["300.0.0.0/8"]) }.message)
    assert_equal true, admin.revoke_token(name)
    refused(401, Clawdforge::AuthError) { client(token: minted.token).list_sessions }
  end

  def test_an_answer_that_takes_too_long
    impatient = client(http_timeout_margin: -4.5)
    error = assert_raises(Clawdforge::TransportError) { impatient.run(prompt: stub(delay_ms: 20_000), timeout_secs: 5) }
    assert_instance_of Net::ReadTimeout, error.cause
  end

  def test_the_examples
    root = File.expand_path("..", __dir__)
    shown = { "run.rb" => /model stub/,
              "file.rb" => /\A\d+ bytes, kept for 600 s\n.*model stub/,
              "session.rb" => /\A1: .*\n2: .*\nturns so far: 2\nopen: / }
    assert_equal shown.keys.sort, Dir.children("#{root}/examples").sort
    shown.each do |example, lines|
      output, errors, status = Open3.capture3(RbConfig.ruby, "-w", "-I", "#{root}/lib", "#{root}/examples/#{example}")
      assert_predicate status, :success?, "#{example}: #{errors}"
      assert_match lines, output
      refute_match(/warning/, errors)
    end
  end
end
