# frozen_string_literal: true

require_relative "test_helper"

class ErrorTest < ClientTest
  def refused(status, answer, **options)
    stub_request(:post, "#{URL}/run").to_return(status: status, body: answer, **options)
    assert_raises(Clawdforge::APIError) { client.run(prompt: "hi") }
  end

  def test_the_family
    assert_equal StandardError, Clawdforge::Error.superclass
    [Clawdforge::TransportError, Clawdforge::APIError, Clawdforge::ClosedSessionError].each do |kind|
      assert_equal Clawdforge::Error, kind.superclass
    end
    assert_equal Clawdforge::APIError, Clawdforge::AuthError.superclass
  end

  def test_the_problems_detail_is_in_the_message
    problem = { "type" => "about:blank", "title" => "Bad Request", "status" => 400, "detail" => "The file “ff_1” is unknown." }
    error = refused(400, JSON.generate(problem))
    assert_equal [400, problem, "HTTP 400: The file “ff_1” is unknown."], [error.status, error.body, error.message]
    assert_instance_of Clawdforge::APIError, error
  end

  def test_401_and_403_are_auth_errors
    [401, 403].each do |status|
      error = refused(status, '{"detail": "Send a valid token."}')
      assert_instance_of Clawdforge::AuthError, error
      assert_equal [status, "HTTP #{status}: Send a valid token."], [error.status, error.message]
    end
  end

  def test_a_failed_runs_error_is_in_the_message
    error = refused(502, '{"ok": false, "error": "API Error: 529", "stderr": "x", "duration_ms": 1, "stop_reason": "error"}')
    assert_equal "HTTP 502: API Error: 529", error.message
    assert_equal %w[error x], error.body.values_at("stop_reason", "stderr")
  end

  def test_422_lists_the_fields
    problem = { "detail" => "Correct what \"errors\" lists.", "errors" => [
      { "pointer" => "/prompt", "detail" => "a prompt is needed" }, { "pointer" => "", "detail" => "no object" }
    ] }
    assert_equal 'HTTP 422: Correct what "errors" lists. /prompt: a prompt is needed; no object',
                 refused(422, JSON.generate(problem)).message
  end

  def test_answers_that_are_no_problems
    page = "<h1>Bad gateway: Bearer #{TOKEN}</h1>"
    error = refused(502, page, status: [502, "Bad Gateway"])
    assert_equal [502, page, "HTTP 502: Bad Gateway"], [error.status, error.body, error.message]
    refute_includes logged(error), TOKEN
    assert_equal [nil, "HTTP 500"], [refused(500, "").body, refused(500, "").message]
    assert_equal ["[1]", "HTTP 500"], [refused(500, "[1]").body, refused(500, "[1]").message]
    ["{}", '{"detail": 5, "errors": 7}', '{"detail": "", "errors": [1]}'].each { |odd| assert_equal "HTTP 500", refused(500, odd).message }
    assert_predicate refused(500, "\xFF").body, :valid_encoding?
  end

  def test_a_redirect_is_not_followed
    error = refused(307, "", headers: { "Location" => "http://elsewhere.test/run" })
    assert_equal 307, error.status
    assert_not_requested :any, /elsewhere/
  end

  def test_a_success_that_is_no_object
    ["[]", "fine", "", "3", '{"ok": true'].each do |answer|
      error = refused(200, answer)
      assert_equal [200, "HTTP 200: the answer to POST /run is not a JSON object"], [error.status, error.message]
      answer.empty? ? assert_nil(error.body) : assert_equal(answer, error.body)
    end
  end

  def test_a_new_token_in_an_answer_that_was_not_understood_is_not_shown
    answers(:post, "/admin/tokens", '{"token": "cf_minted", ')
    refute_includes logged(assert_raises(Clawdforge::APIError) { client.create_token("app") }), "cf_minted"
  end

  def test_what_fails_below_is_a_transport_error_with_its_cause
    [Errno::ECONNREFUSED, Errno::ECONNRESET, Errno::EHOSTUNREACH, SocketError, EOFError, IOError, OpenSSL::SSL::SSLError,
     Net::OpenTimeout, Net::ReadTimeout, Net::WriteTimeout, Net::HTTPBadResponse, Net::ProtocolError].each do |below|
      stub_request(:post, "#{URL}/run").to_raise(below)
      error = assert_raises(Clawdforge::TransportError) { client.run(prompt: "hi") }
      assert_instance_of below, error.cause
      assert_match %r{\APOST /run: }, error.message
      refute_includes logged(error), TOKEN
    end
    assert_requested :post, "#{URL}/run", times: 12
  end

  def test_a_defect_is_not_taken_for_a_transport_error
    stub_request(:post, "#{URL}/run").to_raise(TypeError)
    assert_raises(TypeError) { client.run(prompt: "hi") }
  end
end
