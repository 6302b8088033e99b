# frozen_string_literal: true

require "pathname"

module Clawdforge
  # An app's access to a clawdforge server; with the admin token, the operator's. It may be used from many threads.
  #
  # Nothing that does work is sent twice, for a run costs money. Every call may raise {TransportError}, {AuthError} and {APIError}.
  class Client
    # @param base_url [String] such as "http://127.0.0.1:8800"; a path is kept as a prefix
    # @param token [String] the app's token; for the calls that manage tokens, the admin token
    # @param default_model [String] the model of runs that name none
    # @param default_timeout [Integer] seconds that a run may take that doesn't say
    # @param http_timeout_margin [Numeric] seconds for which an answer is awaited beyond the time of the work itself
    # @param http_client [#request, nil] sends the requests in place of one new Net::HTTP for each: anything with
    #   Net::HTTP's +request(net_http_request)+, with a block for streams. Its +read_timeout+ is set where it has one, and it
    #   is never closed, but for a Net::HTTP whose stream was left.
    # @raise [ArgumentError] where base_url is no http or https URL
    def initialize(base_url:, token:, default_model: "sonnet", default_timeout: 120, http_timeout_margin: 30,
                   http_client: nil)
      @http = HTTP.new(base_url: base_url, token: token, default_timeout: default_timeout,
                       margin: http_timeout_margin, http_client: http_client)
      @default_model = default_model
      @default_timeout = default_timeout
    end

    # Tells how the server is. Sends no token.
    #
    # @return [Hash] "ok", "version", "claude_present", "claude_version", "acpx_present", "acpx_version", "open_sessions"
    # @raise [APIError, TransportError]
    def healthz
      @http.call(Net::HTTP::Get, "/healthz", bearer: false)
    end

    # Runs a prompt and waits for the reply.
    #
    # @param prompt [String] not empty, up to 10 MiB
    # @param model [String, nil] default_model where it is nil
    # @param system [String, nil] a system prompt
    # @param files [Array<String, FileToken>, nil] uploads for the agent to read
    # @param timeout_secs [Integer, nil] seconds that the run may take, 5 to 600; default_timeout where it is nil
    # @param schema [Hash, nil] a JSON Schema, of which the result is then a value
    # @param idempotency_key [String, nil] up to 255 visible characters; sent again with the same one, the request gives
    #   the first one's answer and runs nothing
    # @param stream [Boolean] whether not to wait for the reply
    # @param agent [String, nil] another of the server's agents than claude
    # @param permissions [String, nil] of another agent: "deny-all", which it has where it is nil, "approve-reads" or "approve-all"
    # @param on_permission [#call, nil] has the agent ask before it acts, and answers: gets the question (a Hash) and gives "allow",
    #   "deny", an option's id, or a Hash; one that raises cancels the run. Not with an http_client that has one
    #   connection only
    # @param permission_timeout_secs [Integer, nil] seconds after which a question is refused, 10 to 3600
    # @yieldparam event [Event] each thing that the run says, as it happens
    # @return [RunResult, EventStream] the events where +stream+ is true and there is no block
    # @raise [ArgumentError] for an empty prompt, before anything is sent
    # @raise [APIError] 502 where the agent failed or ran out of time, 503 where the server is busy, 400 for a file that
    #   is unknown or expired, 422 for other bad input
    # @raise [AuthError, TransportError]
    def run(prompt:, model: nil, files: nil, timeout_secs: nil, idempotency_key: nil, on_permission: nil, stream: false,
            **options, &block)
      options = options.merge(permissions: "ask") if on_permission
      body = run_body(prompt, model, files, timeout_secs, **options)
      if stream || block || on_permission
        events = EventStream.of_run(@http, body, idempotency_key, on_permission)
        return stream && !block ? events : events.each(&(block || proc {}))
      end
      secs = body[:timeout_secs]
      RunResult.from(@http.call(Net::HTTP::Post, "/run", json: body, key: idempotency_key, work_secs: secs))
    end

    # Begins a run in the background, which goes on whatever becomes of this client. It takes what {#run} takes.
    #
    # @param ask [Boolean] whether the agent asks before it acts: see {#run_permissions}
    # With +webhook:+ that address is told of its end, instead of the app's own: see {Webhooks.verify}.
    # @return [RunState]
    # @raise (see #run)
    def submit(prompt:, model: nil, files: nil, timeout_secs: nil, idempotency_key: nil, ask: false, **options)
      options = options.merge(permissions: "ask") if ask
      body = run_body(prompt, model, files, timeout_secs, **options)
      headers = { "Prefer" => "respond-async" }
      RunState.from(@http.call(Net::HTTP::Post, "/run", json: body, key: idempotency_key, headers: headers))
    end

    # @param run_id [String] a run's id
    # @return [RunState] how far it has come
    # @raise [ArgumentError] for an empty id, before anything is sent
    # @raise [APIError] 404 where there is no such run
    # @raise [AuthError, TransportError]
    def get_run(run_id)
      RunState.from(@http.call(Net::HTTP::Get, "/runs/#{HTTP.segment("run_id", run_id)}"))
    end

    # @param run_id [String] a run's id
    # @return [Array<Hash>] what its agent asks and nobody has answered yet
    # @raise (see #get_run)
    def run_permissions(run_id)
      @http.call(Net::HTTP::Get, "/runs/#{HTTP.segment("run_id", run_id)}/permissions").fetch("permissions", [])
    end

    # Answers what a run's agent asks, as {Session#answer} does.
    #
    # @return [Hash]
    # @raise (see Session#answer)
    def answer_run(run_id, permission_id, answer)
      place = "/runs/#{HTTP.segment("run_id", run_id)}/permissions/#{HTTP.segment("permission_id", permission_id)}"
      @http.call(Net::HTTP::Post, place, json: EventStream.permission_body(answer))
    end

    # Ends a run, whose processes are gone when this returns.
    #
    # @param run_id [String] a run's id
    # @return [Boolean] whether there was anything to end
    # @raise (see #get_run)
    def cancel(run_id)
      !@http.call(Net::HTTP::Delete, "/runs/#{HTTP.segment("run_id", run_id)}")["already_over"]
    end

    # Uploads a file for runs and turns to read. It is streamed, never whole in memory.
    #
    # @param path [String, Pathname, IO] a path, or an open IO, which is read from where it stands and not closed
    # @param ttl_secs [Integer] seconds until the upload expires, 60 to 86,400
    # @param filename [String, nil] the name that the agent sees; the file's own where it is nil
    # @param content_type [String]
    # @return [FileToken]
    # @raise [SystemCallError] where the file can't be opened, such as Errno::ENOENT, before anything is sent
    # @raise [APIError] 400 for a bad ttl_secs, 413 for a file over the server's limit
    # @raise [AuthError, TransportError]
    def upload_file(path, ttl_secs: 3600, filename: nil, content_type: "application/octet-stream")
      if path.respond_to?(:read) && !path.is_a?(Pathname)
        filename ||= File.basename((path.respond_to?(:path) && path.path) || "file")
        upload = Multipart.new(path, filename, content_type)
        query = URI.encode_www_form(ttl_secs: ttl_secs)
        return FileToken.from(@http.call(Net::HTTP::Post, "/files?#{query}", upload: upload))
      end
      raise Errno::EISDIR, path.to_s if File.directory?(path)

      File.open(path, "rb") do |file|
        upload_file(file, ttl_secs: ttl_secs, filename: filename, content_type: content_type)
      end
    end

    # @return [Batches] many runs at once
    def batches
      Batches.new(@http)
    end

    # Mints a token for an app. Needs the admin token.
    #
    # @param name [String] the app's name
    # @param ip_cidrs [Array<String>, nil] the networks that it may be used from; any where it is nil or empty
    # @param webhook [String, nil] who is told of what ends in the background: see {Webhooks.verify}
    # @return [AppToken] with its token, and the secret of its webhooks, which the server shows only this once
    # @raise [APIError] 409 where the name is in use, 422 for a bad name or network
    # @raise [AuthError, TransportError]
    def create_token(name, ip_cidrs: nil, webhook: nil)
      ip_cidrs = nil if ip_cidrs&.empty?
      minted = @http.call(Net::HTTP::Post, "/admin/tokens", json: { name: name, ip_cidrs: ip_cidrs, webhook: webhook }.compact)
      AppToken.from({ "enabled" => true }.merge(minted))
    end

    # Lists the apps' tokens. Needs the admin token.
    #
    # @return [Array<AppToken>] without the tokens themselves
    # @raise [AuthError, APIError, TransportError]
    def list_tokens
      @http.call(Net::HTTP::Get, "/admin/tokens").fetch("tokens", []).map { |token| AppToken.from(token) }
    end

    # Revokes an app's token, which then fails on its next request. Needs the admin token.
    #
    # @param name [String] the app's name
    # @return [true]
    # @raise [ArgumentError] for an empty name, before anything is sent
    # @raise [APIError] 404 where there is no such token
    # @raise [AuthError, TransportError]
    def revoke_token(name)
      @http.call(Net::HTTP::Delete, "/admin/tokens/#{HTTP.segment("name", name)}")
      true
    end

    # Opens a session. With a block, closes it when the block is left, in whichever way; an error from closing never
    # takes the place of the block's own.
    #
    # @param agent [String] one of the server's agents
    # @param model [String, nil] the model of every turn; the agent's own where it is nil
    # @param meta [Hash, nil] an object of the app's own, kept with the session
    # @param options [Hash] +system+ (added to the agent's system prompt), +permissions+ ("approve-all", "approve-reads",
    #   "deny-all" or "ask"), +permission_timeout_secs+ and +allow_always+
    # @yieldparam session [Session]
    # @return [Session, Object] the open session; with a block, what the block gave
    # @raise [APIError] 422 for an unknown agent or other bad input, 503 where as many sessions are open as may be,
    #   502 where the agent's client failed
    # @raise [AuthError, TransportError]
    def session(agent: "claude", model: nil, meta: nil, **options)
      session = create_session(agent: agent, model: model, meta: meta, **options)
      return session unless block_given?

      begin
        yield session
      rescue Exception => e
        raise
      ensure
        begin
          session.close
        rescue Error
          raise unless e
        end
      end
    end

    # Opens a session, as {#session} does without a block.
    #
    # @param idempotency_key [String, nil] sent again with the same one, the request gives the first one's session
    # @return [Session] open until it is closed
    # @raise (see #session)
    def create_session(agent: "claude", model: nil, meta: nil, idempotency_key: nil, system: nil, permissions: nil,
                       permission_timeout_secs: nil, allow_always: nil)
      body = { agent: agent, model: model, meta: meta, system: system, permissions: permissions,
               permission_timeout_secs: permission_timeout_secs, allow_always: allow_always }
      Session.new(@http, @http.call(Net::HTTP::Post, "/sessions", json: body, key: idempotency_key))
    end

    # Lists one's own sessions, newest first.
    #
    # @param include_closed [Boolean]
    # @return [Array<SessionState>]
    # @raise [AuthError, APIError, TransportError]
    def list_sessions(include_closed: true)
      query = URI.encode_www_form(include_closed: include_closed ? true : false)
      @http.call(Net::HTTP::Get, "/sessions?#{query}").fetch("sessions", []).map { |state| SessionState.from(state) }
    end

    # @param id [String] a session's id
    # @return [SessionState]
    # @raise [ArgumentError] for an empty id, before anything is sent
    # @raise [APIError] 404 where there is no such session
    # @raise [AuthError, TransportError]
    def get_session(id)
      SessionState.from(@http.call(Net::HTTP::Get, "/sessions/#{HTTP.segment("id", id)}"))
    end

    def inspect
      "#<#{self.class} #{@http.base_url}>"
    end

    private

    def run_body(prompt, model, files, timeout_secs, agent: nil, permissions: nil, permission_timeout_secs: nil,
                 system: nil, schema: nil, webhook: nil)
      model ||= @default_model if [nil, "claude"].include?(agent)
      { prompt: HTTP.present("prompt", prompt), model: model, system: system, files: FileToken.list(files),
        timeout_secs: timeout_secs || @default_timeout, schema: schema, agent: agent, permissions: permissions,
        permission_timeout_secs: permission_timeout_secs, webhook: webhook }
    end
  end
end
