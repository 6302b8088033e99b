# frozen_string_literal: true

module Clawdforge
  # The parent of every error that this library defines.
  class Error < StandardError; end

  # No whole answer came: the connection was refused, reset, timed out, failed in DNS or TLS, or was cut short. Whether
  # the server did the work is unknown. +cause+ is the error below it.
  class TransportError < Error; end

  # A turn was to be sent on a session that was closed here. Nothing was sent.
  class ClosedSessionError < Error; end

  # The server answered with something else than a success. The message is the status and the server's own explanation.
  class APIError < Error
    # @return [Integer] the HTTP status
    attr_reader :status
    # @return [Hash, String, nil] the answer's body: a Hash where it is a JSON object, nil where it is empty
    attr_reader :body

    def initialize(message = nil, status: nil, body: nil)
      super(message)
      @status = status
      @body = body
    end

    # @api private
    # @return [APIError] the error for an answer, of the class for its status
    def self.for(status, reason, body)
      text = ["HTTP #{status}", explain(body) || reason].reject { |part| part.to_s.empty? }.join(": ")
      ([401, 403].include?(status) ? AuthError : APIError).new(text, status: status, body: body)
    end

    # Nothing but the words that are meant for the caller: a proxy's page may repeat the request with its headers.
    def self.explain(body)
      return unless body.is_a?(Hash)

      detail = body.values_at("detail", "error").find { |text| text.is_a?(String) && !text.empty? }
      fields = Array(body["errors"]).grep(Hash).map do |error|
        error.values_at("pointer", "detail").reject { |part| part.to_s.empty? }.join(": ")
      end
      words = [detail, fields.join("; ")].reject { |part| part.to_s.empty? }.join(" ")
      words unless words.empty?
    end
    private_class_method :explain
  end

  # The token is missing, unknown or revoked (401), or may not be used for this or from here (403).
  class AuthError < APIError; end
end
