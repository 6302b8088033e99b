# frozen_string_literal: true

require "json"
require "openssl"

module Clawdforge
  # A request that the server did not send, or not now.
  class WebhookError < Error; end

  # Webhooks: what the server sends when something in the background has ended, signed as https://www.standardwebhooks.com has it.
  module Webhooks
    # How far the clocks may be apart, in seconds.
    TOLERANCE = 300

    # What a webhook says. One may come more than once: its +webhook-id+ is the same each time.
    #
    # @param secret [String] the app's +whsec_…+
    # @param headers [Hash] the request's headers, by their names in any case
    # @param body [String] what came, to the byte
    # @param tolerance [Numeric] how far the clocks may be apart, in seconds
    # @return [Hash] +type+, +timestamp+, +data+
    # @raise [WebhookError] unless it is signed with the secret
    # @raise [ArgumentError] for a secret that is none
    def self.verify(secret, headers, body, tolerance: TOLERANCE)
      given = headers.to_h { |name, value| [name.to_s.downcase.tr("_", "-").delete_prefix("http-"), Array(value).first.to_s] }
      id, at, signatures = %w[webhook-id webhook-timestamp webhook-signature].map do |name|
        given.fetch(name) { raise WebhookError, "the request has no #{name}" }
      end
      check_time(at, tolerance)
      expected = "v1,#{[OpenSSL::HMAC.digest("SHA256", key(secret), "#{id}.#{at}.#{body}".b)].pack("m0")}"
      # All of them, so that how long it takes tells nothing.
      matches = signatures.split.map { |signature| OpenSSL.secure_compare(expected, signature) }
      raise WebhookError, "the webhook is not signed with this secret" unless matches.any?

      JSON.parse(body)
    end

    def self.key(secret)
      secret.delete_prefix("whsec_").unpack1("m0")
    rescue ArgumentError
      raise ArgumentError, "secret must be the app's whsec_…"
    end
    private_class_method :key

    def self.check_time(at, tolerance)
      apart = (Time.now.to_i - Integer(at, 10)).abs
      raise WebhookError, "the webhook was signed #{apart} s ago or ahead" if apart > tolerance
    rescue ArgumentError
      raise WebhookError, "the webhook-timestamp is no number"
    end
    private_class_method :check_time
  end
end
