# frozen_string_literal: true

module Clawdforge
  # A conversation of many turns. {Client#session} and {Client#create_session} make one.
  class Session
    # Seconds that the server gives a turn that doesn't ask for another time.
    TURN_SECS = 600
    private_constant :TURN_SECS

    # @return [String] the session's id
    attr_reader :id
    # @return [String] the agent's name
    attr_reader :agent
    # @return [Integer] Unix seconds
    attr_reader :created_at
    # @return [String] the session's folder on the server
    attr_reader :cwd

    # @api private
    def initialize(http, answer)
      @http = http
      @id, @agent, @created_at, @cwd = answer.values_at("session_id", "agent", "created_at", "cwd")
      @closed = false
      @closing = Mutex.new
    end

    # Sends a turn and waits for the agent's answer. Turns of one session run one at a time, in the order that they came.
    #
    # @param prompt [String] not empty
    # @param files [Array<String, FileToken>, nil] uploads for the agent to read
    # @param timeout_secs [Integer, nil] seconds that the turn may take; the server's own 600 where it is nil
    # @param idempotency_key [String, nil] as {Client#run} takes it
    # @param stream [Boolean] whether not to wait for the answer; leaving a stream cancels its turn
    # @param on_permission [#call, nil] answers what the agent of a session with permissions "ask" asks: gets the question (a
    #   Hash) and gives "allow", "deny", an option's id, or a Hash; one that raises cancels the turn
    # @yieldparam event [Event] each message of the agent, as it comes
    # @return [TurnResult, EventStream] the events where +stream+ is true and there is no block
    # @raise [ArgumentError] for an empty prompt, before anything is sent
    # @raise [ClosedSessionError] after {#close}, before anything is sent
    # @raise [APIError] 502 where the agent failed or ran out of time (the session stays usable), 410 where the session
    #   was closed elsewhere, 404 where it is gone, 422 for bad input
    # @raise [AuthError, TransportError]
    def turn(prompt, files: nil, timeout_secs: nil, idempotency_key: nil, on_permission: nil, stream: false, &block)
      HTTP.present("prompt", prompt)
      raise ClosedSessionError, "session #{id} is closed; create another one" if closed?

      body = { prompt: prompt, files: FileToken.list(files), timeout_secs: timeout_secs }
      if stream || block || on_permission
        events = EventStream.of_turn(@http, path, body, idempotency_key, on_permission)
        return stream && !block ? events : events.each(&(block || proc {}))
      end
      secs = timeout_secs || TURN_SECS
      TurnResult.from(@http.call(Net::HTTP::Post, "#{path}/turn", json: body, key: idempotency_key, work_secs: secs))
    end

    # @return [Array<Hash>] what its agent asks and nobody has answered yet
    # @raise [AuthError, APIError, TransportError]
    def permissions
      @http.call(Net::HTTP::Get, "#{path}/permissions").fetch("permissions", [])
    end

    # Answers what its agent asks. The same answer can be given again.
    #
    # @param permission_id [String]
    # @param answer [String, Hash] "allow", "deny", an option's id, or what the server takes
    # @return [Hash]
    # @raise [APIError] 409 where it was answered otherwise, 410 where it is over, 422 for what it does not offer
    # @raise [AuthError, TransportError]
    def answer(permission_id, answer)
      place = "#{path}/permissions/#{HTTP.segment("permission_id", permission_id)}"
      @http.call(Net::HTTP::Post, place, json: EventStream.permission_body(answer))
    end

    # Cancels the turn that is running and those that wait. The session stays open.
    #
    # @return [Integer] how many
    # @raise [APIError] 404 where the server has deleted it
    # @raise [AuthError, TransportError]
    def cancel
      @http.call(Net::HTTP::Post, "#{path}/cancel", json: {})["cancelled"]
    end

    # @return [SessionState] the session as the server has it now
    # @raise [APIError] 404 where the server has deleted it
    # @raise [AuthError, TransportError]
    def state
      SessionState.from(@http.call(Net::HTTP::Get, path))
    end

    # Closes the session. It may be called any number of times and sends one request; one that failed can be tried
    # again. A turn that is running is cancelled.
    #
    # @return [nil]
    # @raise [APIError] 404 where the server has deleted it
    # @raise [AuthError, TransportError]
    def close
      @closing.synchronize do
        @http.call(Net::HTTP::Delete, path) unless @closed
        @closed = true
      end
      nil
    end

    # @return [Boolean] whether it was closed here
    def closed?
      @closed
    end

    def inspect
      "#<#{self.class} id=#{id.inspect} agent=#{agent.inspect} closed=#{closed?}>"
    end

    private

    def path
      "/sessions/#{HTTP.segment("session id", id)}"
    end
  end
end
