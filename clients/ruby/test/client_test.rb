# frozen_string_literal: true

require_relative "test_helper"

class ClientBasicsTest < ClientTest
  HEALTH = { "ok" => true, "version" => "0.1.0", "claude_present" => true, "claude_version" => nil, "open_sessions" => 0 }.freeze

  def test_healthz_gives_the_hash_and_sends_no_token
    answers(:get, "/healthz", HEALTH)
    assert_equal HEALTH, client.healthz
    assert_requested :get, "#{URL}/healthz", times: 1
    assert_not_requested :get, "#{URL}/healthz", headers: { "Authorization" => /./ }
  end

  def test_trailing_slashes_are_dropped_and_a_prefix_is_kept
    stub_request(:get, "#{URL}/api/v1/healthz").to_return(body: "{}")
    stub_request(:get, "#{URL}/healthz").to_return(body: "{}")
    ["/api/v1", "/api/v1/", "/api/v1//", "", "/", "//"].each { |path| client(base_url: URL + path).healthz }
    assert_requested :get, "#{URL}/api/v1/healthz", times: 3
    assert_requested :get, "#{URL}/healthz", times: 3
  end

  def test_https_and_ipv6
    stub_request(:get, "https://[::1]:8443/healthz").to_return(body: "{}")
    assert_equal({}, client(base_url: "https://[::1]:8443").healthz)
  end

  def test_a_base_url_that_is_none_is_an_argument_error_that_does_not_repeat_it
    ["", nil, "clawdforge.test:8800", "ftp://host", "http://", "/run", "http://u:s3cret@ho st", "http://h/?key=s3cret",
     "http://h/#s3cret"].each do |url|
      error = assert_raises(ArgumentError, url.inspect) { client(base_url: url) }
      refute_includes logged(error), "s3cret"
    end
  end

  def test_a_client_shows_its_url_alone
    made = client(base_url: "http://user:s3cret@clawdforge.test:8800/api/", http_client: FakeHTTP.new)
    assert_equal "#<Clawdforge::Client http://[hidden]@clawdforge.test:8800/api>", made.inspect
    [TOKEN, "user", "s3cret"].each { |secret| refute_includes shown(made), secret }
    refute_includes assert_raises(NoMethodError) { made.no_such_thing }.message, TOKEN
  end

  def test_a_token_that_would_break_the_header_is_refused_and_not_shown
    error = assert_raises(ArgumentError) { client(token: "cf_abc\r\nX-Evil: 1").list_tokens }
    refute_includes logged(error), "cf_abc"
  end

  def test_http_client_sends_the_requests_and_gets_each_time
    http = FakeHTTP.new("session_id" => "abc")
    made = client(http_client: http, default_timeout: 60, http_timeout_margin: 7)
    session = made.create_session
    session.turn("hi")
    session.turn("hi", timeout_secs: 20)
    session.state
    session.close
    made.run(prompt: "hi")
    made.run(prompt: "hi", timeout_secs: 5)
    made.run(prompt: "hi", timeout_secs: -100)
    made.upload_file(StringIO.new("x"))
    assert_equal [67, 607, 27, 67, 67, 67, 12, 7, 67], http.timeouts
    assert_equal ["/sessions", "/sessions/abc/turn"], http.requests.map(&:path).first(2)
    assert_equal ["Bearer #{TOKEN}"], http.requests.map { |request| request["Authorization"] }.uniq
  end

  def test_http_client_needs_nothing_but_request
    http = FakeHTTP.new
    bare = Object.new
    bare.define_singleton_method(:request) { |request| http.request(request) }
    assert_equal({ "ok" => true }, client(http_client: bare).healthz)
  end

  def test_http_client_may_be_a_net_http_which_stays_open
    answers(:get, "/healthz", HEALTH)
    Net::HTTP.start("clawdforge.test", 8800) do |http|
      assert_equal HEALTH, client(http_client: http).healthz
      assert_predicate http, :started?
      assert_equal 150, http.read_timeout
    end
  end
end
