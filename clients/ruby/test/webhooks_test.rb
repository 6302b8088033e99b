# frozen_string_literal: true

require_relative "test_helper"

# By the specification's own vectors.
class WebhooksTest < Minitest::Test
  SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
  BODY = '{"test": 2432232314}'
  HEADERS = {
    "webhook-id" => "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp" => "1614265330",
    "webhook-signature" => "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
  }.freeze

  def verify(headers = HEADERS, body = BODY, secret = SECRET)
    Clawdforge::Webhooks.verify(secret, headers, body, tolerance: Time.now.to_i)
  end

  def test_what_is_signed
    assert_equal({ "test" => 2_432_232_314 }, verify)
    rack = HEADERS.to_h { |name, value| ["HTTP_#{name.upcase.tr("-", "_")}", value] }
    assert_equal({ "test" => 2_432_232_314 }, verify(rack))
    several = "v1,AAAA v2,x #{HEADERS["webhook-signature"]}"
    assert_equal({ "test" => 2_432_232_314 }, verify(HEADERS.merge("webhook-signature" => several)))
  end

  def test_what_is_not
    [
      [HEADERS, "#{BODY} "],
      [HEADERS.merge("webhook-id" => "msg_1"), BODY],
      [HEADERS.merge("webhook-timestamp" => "1614265331"), BODY],
      [HEADERS.merge("webhook-timestamp" => "soon"), BODY],
      [HEADERS.merge("webhook-signature" => ""), BODY],
      [{}, BODY]
    ].each { |headers, body| assert_raises(Clawdforge::WebhookError) { verify(headers, body) } }
    assert_raises(Clawdforge::WebhookError) { verify(HEADERS, BODY, "whsec_AAAA") }
    assert_raises(ArgumentError) { verify(HEADERS, BODY, "whsec_!") }
  end

  def test_what_is_old
    error = assert_raises(Clawdforge::WebhookError) { Clawdforge::Webhooks.verify(SECRET, HEADERS, BODY) }
    assert_match(/ago/, error.message)
  end
end
