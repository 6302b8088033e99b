# frozen_string_literal: true

require "erb"
require "json"
require "net/http"
require "openssl"
require "uri"

module Clawdforge
  # Sends requests, one connection each, none twice. Every answer is a Hash or an exception.
  class HTTP
    HEADERS = {
      "Accept" => "application/json",
      # So that the body can be compared with its Content-Length.
      "Accept-Encoding" => "identity",
      "User-Agent" => "clawdforge-ruby/#{VERSION}"
    }.freeze
    FAILURES = [IOError, SystemCallError, SocketError, Timeout::Error, OpenSSL::SSL::SSLError, Net::ProtocolError,
                Net::HTTPBadResponse, Net::HTTPHeaderSyntaxError].freeze
    # Seconds after which the server says something on a stream, if only that it is there.
    BEAT = 15

    # @return [String] the server's address, without what signs in to it
    attr_reader :base_url

    def initialize(base_url:, token:, default_timeout:, margin:, http_client:)
      @uri = parse_url(base_url.to_s)
      @prefix = @uri.path.sub(%r{/+\z}, "")
      @base_url = base_url.to_s.sub(%r{\A(\w+://)[^/]*@}, "\\1[hidden]@").sub(%r{/+\z}, "")
      @token = token
      @default_timeout = default_timeout
      @margin = margin
      @http_client = http_client
    end

    # @return [Object] the value
    # @raise [ArgumentError] where it is nil or empty
    def self.present(name, value)
      raise ArgumentError, "#{name} must not be empty" if value.to_s.empty?

      value
    end

    # @return [String] the value as one segment of a path
    # @raise [ArgumentError] where it is nil or empty
    def self.segment(name, value)
      ERB::Util.url_encode(present(name, value).to_s)
    end

    # @return [String, nil] the idempotency key
    # @raise [ArgumentError] where it is none
    def self.key(key)
      raise ArgumentError, "idempotency_key must be 1 to 255 visible ASCII characters" unless key.nil? || key.match?(/\A[!-~]{1,255}\z/)

      key
    end

    # The parser's own error goes no further: it quotes the text, which may have a new token in it.
    #
    # @return [Hash, String, nil] the text itself where it is no JSON object, nil where it is empty
    def self.parse(text)
      text = text.dup.force_encoding(Encoding::UTF_8).scrub
      value = JSON.parse(text, max_nesting: 1000)
      value.is_a?(Hash) ? value : text
    rescue JSON::ParserError
      text unless text.empty?
    end

    # @param verb [Class] such as Net::HTTP::Get
    # @param work_secs [Numeric, nil] seconds that the server may work before it answers
    # @param options [Hash] what {#build} takes
    # @return [Hash]
    def call(verb, path, work_secs: nil, **options)
      request = build(verb, path, **options)
      answer(request, *exchange(request, [work_secs || @default_timeout, 0].max + @margin))
    end

    # As {#call}, for an answer that comes in pieces. What fails below is raised as it is.
    #
    # @yieldparam response [Net::HTTPResponse] a success, its body not read yet
    def stream(verb, path, **options)
      request = build(verb, path, **options)
      http = connection(BEAT + @margin)
      whole = false
      http.request(request) do |response|
        answer(request, response.code.to_i, response.message, response.body.to_s) unless response.is_a?(Net::HTTPSuccess)
        yield response
      end
      whole = true
    ensure
      # An http_client would take what is left of the answer for the next one.
      http.finish if !whole && http.respond_to?(:finish) && http.started?
    end

    def inspect
      "#<#{self.class} #{base_url}>"
    end

    private

    # @param json [Hash, nil] the body; what is nil in it is not sent
    # @param upload [Multipart, nil] the body
    # @param key [String, nil] the idempotency key
    def build(verb, path, json: nil, upload: nil, bearer: true, key: nil, headers: {})
      request = verb.new(@prefix + path, HEADERS.merge(headers))
      request["Authorization"] = "Bearer #{@token}" if bearer
      request["Idempotency-Key"] = key if HTTP.key(key)
      write_json(request, json) if json
      write_upload(request, upload) if upload
      request
    end

    def parse_url(url)
      uri = URI.parse(url)
      return uri if uri.is_a?(URI::HTTP) && !uri.hostname.to_s.empty? && !uri.query && !uri.fragment

      raise URI::InvalidURIError
    rescue URI::InvalidURIError
      # Without a cause: its message has the URL, and with it any password.
      raise ArgumentError, "base_url must be like http://host:8800, without a query", cause: nil
    end

    def write_json(request, json)
      request.content_type = "application/json"
      request.body = JSON.generate(json.compact)
    rescue JSON::JSONError, EncodingError => e
      raise ArgumentError, "the request can't be written as JSON: #{e.message}"
    end

    def write_upload(request, upload)
      request["Content-Type"] = upload.content_type
      request.body_stream = upload
      if upload.length
        request.content_length = upload.length
      else
        request["Transfer-Encoding"] = "chunked"
      end
    end

    # @return [Array(Integer, String, String)] status, its reason, body
    def exchange(request, timeout)
      response = connection(timeout).request(request)
      text = response.body.to_s
      # Net::HTTP takes the end of the connection for the end of the body.
      raise EOFError, "the answer was cut short" if text.bytesize < response["Content-Length"].to_i

      [response.code.to_i, response.message, text]
    rescue *FAILURES => e
      raise TransportError, "#{request.method} #{request.path}: #{e.message} (#{e.class})"
    end

    def connection(timeout)
      http = @http_client || new_connection(timeout)
      http.read_timeout = timeout if http.respond_to?(:read_timeout=)
      http
    end

    def new_connection(timeout)
      http = Net::HTTP.new(@uri.hostname, @uri.port)
      http.use_ssl = @uri.scheme == "https"
      http.max_retries = 0
      http.open_timeout = http.write_timeout = timeout
      http
    end

    def answer(request, status, reason, text)
      body = HTTP.parse(text)
      raise APIError.for(status, reason, body) unless (200..299).cover?(status)
      return body if body.is_a?(Hash)

      message = "HTTP #{status}: the answer to #{request.method} #{request.path} is not a JSON object"
      raise APIError.new(message, status: status, body: body)
    end
  end
  private_constant :HTTP
end
