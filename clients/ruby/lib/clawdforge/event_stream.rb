# frozen_string_literal: true

require "securerandom"

module Clawdforge
  # The events of a run or turn, while it goes on. The last one is its "result".
  #
  # The request is sent by {#each}, under one idempotency key: read again, the stream tells the same events again. Where the
  # connection breaks, it goes on in another one, with nothing lost or doubled. Whoever leaves before the end, by +break+
  # or an exception, cancels the work. An external enumerator can't tell that it was left.
  class EventStream
    include Enumerable

    # Times in a row, without a new event, that a broken connection is taken up again.
    RESUMES = 3
    # What a stream follows: where it is asked for, the header with its id, and where all such are seen.
    Work = Struct.new(:path, :header, :places, :permissions)
    private_constant :RESUMES, :Work

    # @return [String, nil] the run's id, or the turn's number; nil before the first event
    attr_reader :id
    # @return [RunResult, TurnResult, nil] what the call gives without a stream; nil before the end
    attr_reader :result

    # @api private
    def self.of_run(http, body, key, on_permission = nil)
      new(http, Work.new("/run", "X-Run-Id", "/runs", "/runs/%s/permissions"), body, key, RunResult, on_permission)
    end

    # @api private
    def self.of_turn(http, path, body, key, on_permission = nil)
      work = Work.new("#{path}/turn", "X-Turn", "#{path}/turns", "#{path}/permissions")
      new(http, work, body, key, TurnResult, on_permission)
    end

    # What is sent for an answer to what an agent asks.
    #
    # @api private
    def self.permission_body(answer)
      return answer if answer.is_a?(Hash)

      %w[allow deny].include?(answer.to_s) ? { decision: answer.to_s } : { option_id: answer.to_s }
    end

    # @api private
    def initialize(http, work, body, key, kind, on_permission)
      @http = http
      @work = work
      @body = body
      @kind = kind
      @on_permission = on_permission
      # With a key the work outlives its connection, which can so be taken up again.
      @key = HTTP.key(key) || SecureRandom.uuid
    end
    private_class_method :new

    # @yieldparam event [Event]
    # @return [RunResult, TurnResult, Enumerator] the result; an enumerator without a block
    # @raise [APIError, AuthError] as the call without a stream
    # @raise [TransportError] where the connection breaks again and again; the work goes on without a reader
    def each(&block)
      return enum_for unless block

      @id = @result = nil
      @last = @broken = 0
      @over = @left = false
      begin
        listen(&block) until @over
      ensure
        cancel unless @over
      end
      @result
    end

    def inspect
      "#<#{self.class} id=#{id.inspect}>"
    end

    private

    # Hears the events of one connection.
    def listen(&block)
      connect { |response| events(response) { |event| tell(event, &block) } }
      raise EOFError, "the stream ended before its result" unless @over
    rescue APIError
      @over ||= !@left
      raise
    rescue *HTTP::FAILURES => e
      # What the block raised is the caller's.
      raise if @left

      pause(e) unless @over
    end

    def connect(&block)
      headers = { "Accept" => "text/event-stream" }
      if @id
        headers["Last-Event-ID"] = @last.to_s
        return @http.stream(Net::HTTP::Get, "#{@work.places}/#{@id}/events", headers: headers, &block)
      end
      @http.stream(Net::HTTP::Post, @work.path, json: @body, key: @key, headers: headers) do |response|
        @id = response[@work.header]
        raise APIError.new("HTTP 200: the answer to POST #{@work.path} is no stream", status: 200) unless @id

        block.call(response)
      end
    end

    # One that is cut short is left out: it comes again.
    def events(response)
      id, name, data, line = nil, "", [], +""
      response.read_body do |piece|
        piece.each_line do |part|
          next unless (line << part).end_with?("\n")

          field, value = line.chomp.split(":", 2)
          value = value.to_s.delete_prefix(" ")
          case field
          when "id" then id = Integer(value, 10)
          when "event" then name = value
          when "data" then data << value
          when nil
            yield Event.new(id: id || @last, name: name, data: HTTP.parse(data.join("\n"))) unless data.empty? || seen?(id)
            id, name, data = nil, "", []
          end
          line = +""
        end
      end
    end

    # An http_client may have sent the request again.
    def seen?(id)
      id && id <= @last
    end

    def tell(event)
      @last, @broken = event.id, 0 if event.id > @last
      @over = %w[result error].include?(event.name)
      # A problem says its status; a run or turn that failed is a 502.
      raise APIError.for(event.data.fetch("status", 502), nil, event.data) if event.name == "error"

      @result = @kind.from(event.data) if @over
      @left = true
      answer(event.data) if event.name == "permission_request" && @on_permission
      yield event
      @left = false
    end

    # A callback that raises leaves the stream, so that what was asked is refused with all the rest.
    def answer(question)
      body = EventStream.permission_body(@on_permission.call(question))
      place = format(@work.permissions, @id)
      @http.call(Net::HTTP::Post, "#{place}/#{HTTP.segment("permission_id", question["permission_id"])}", json: body)
    rescue APIError => e
      # It is over, or somebody else was faster.
      raise unless [409, 410].include?(e.status)
    end

    def pause(error)
      if @id.nil? || @broken == RESUMES
        @over = true
        raise TransportError, "#{@work.path}: #{error.message} (#{error.class})"
      end
      # At once, then with time for a server to come back.
      sleep(@broken)
      @broken += 1
    end

    def cancel
      @http.call(Net::HTTP::Delete, "#{@work.places}/#{@id}") if @id
    rescue Error
      # Why the stream was left is what the caller has to see.
      nil
    end
  end
end
