use super::*;
use proptest::prelude::*;

fn read(lines: &[Value]) -> (Vec<Value>, Vec<Option<TurnEnd>>, String) {
    let mut messages = Messages::default();
    let ends = lines.iter().map(|line| messages.line(line.to_string().as_bytes())).collect();
    let text = messages.text().to_owned();
    (serde_json::from_str(&serde_json::to_string(&messages.into_messages()).unwrap()).unwrap(), ends, text)
}

fn update(update: Value) -> Value {
    json!({"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": "s", "update": update}})
}

#[test]
fn each_message_has_the_type_of_the_contract() {
    let lines = [
        json!({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {}}),
        json!({"jsonrpc": "2.0", "id": 0, "result": {"protocolVersion": 1}}),
        json!({"jsonrpc": "2.0", "id": 3, "method": "session/prompt", "params": {}}),
        update(json!({"sessionUpdate": "agent_thought_chunk", "content": {"type": "text", "text": "hm"}})),
        update(json!({"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "He"}})),
        json!({"method": "session/update", "params": {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "llo"}}}),
        update(json!({"sessionUpdate": "plan", "entries": []})),
        update(json!({"sessionUpdate": "something_new"})),
        json!({"jsonrpc": "2.0", "id": 3, "method": "session/request_permission", "params": {}}),
        json!({"jsonrpc": "2.0", "id": 3, "error": {"code": 1, "message": "no"}}),
        json!({"jsonrpc": "2.0", "id": 3, "result": {"stopReason": "end_turn", "usage": {"inputTokens": 2, "outputTokens": 3, "cachedReadTokens": 4}}}),
    ];
    let (events, ends, text) = read(&lines);
    let types: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        types,
        ["protocol", "protocol", "protocol", "thinking", "text", "text", "plan", "something_new", "permission_request", "error", "stop"]
    );
    assert_eq!(text, "Hello");
    assert_eq!(events[9]["content"], "no");
    assert_eq!(ends.into_iter().flatten().collect::<Vec<_>>(), [TurnEnd::Stopped("end_turn".to_owned())]);
}

#[test]
fn a_tool_call_gathers_the_last_known_of_its_updates() {
    let (events, ..) = read(&[
        update(
            json!({"sessionUpdate": "tool_call", "toolCallId": "t", "title": "Terminal", "rawInput": {}, "status": "pending", "content": []}),
        ),
        update(json!({"sessionUpdate": "tool_call_update", "toolCallId": "t", "title": "echo hi", "rawInput": {"command": "echo hi"}})),
        update(json!({"sessionUpdate": "tool_call_update", "toolCallId": "t", "status": "completed", "rawOutput": "hi"})),
        update(json!({"sessionUpdate": "tool_call_update", "toolCallId": "other", "status": "failed"})),
    ]);
    let call = &events[0];
    assert_eq!((&call["name"], &call["args"]), (&json!("echo hi"), &json!({"command": "echo hi"})));
    assert_eq!((&call["result"], &call["status"]), (&json!("hi"), &json!("completed")));
    assert_eq!(call["params"]["update"]["status"], "pending", "the message itself stays as it was");
    assert_eq!(events[1]["type"], "tool_call_update");
}

#[test]
fn half_a_character_costs_no_more_than_itself() {
    let mut messages = Messages::default();
    let update = r#"{"method":"session/update","params":{"update":{"sessionUpdate":"agent_message_chunk","content":{"text":"a\ud83d \\ud83d \ud83d\ude00"}}}}"#;
    assert_eq!(messages.line(update.as_bytes()), None);
    assert_eq!(messages.text(), "a\u{fffd} \\ud83d \u{1f600}");
}

#[test]
fn a_request_of_the_agents_own_kind_that_the_client_does_not_know_does_not_end_the_turn() {
    let (_, ends, _) = read(&[
        json!({"id": 3, "method": "session/prompt", "params": {}}),
        json!({"id": 3, "method": "craft/drainMidTurnQueue", "params": {}}),
        json!({"id": 3, "error": {"code": -32601, "message": "Method not found"}}),
        json!({"id": 3, "result": {"stopReason": "end_turn"}}),
    ]);
    assert_eq!(ends.into_iter().flatten().collect::<Vec<_>>(), [TurnEnd::Stopped("end_turn".to_owned())]);
}

#[test]
fn the_clients_own_error_ends_the_turn() {
    let (_, ends, _) = read(&[json!({"jsonrpc": "2.0", "id": null, "error": {"message": "No acpx session found"}})]);
    assert_eq!(ends, [Some(TurnEnd::Failed("No acpx session found".to_owned()))]);
}

#[test]
fn the_mode_is_the_last_that_the_agent_told() {
    let mut messages = Messages::default();
    let mut mode_after = |message: Value| {
        messages.line(message.to_string().as_bytes());
        messages.mode_at_work().map(str::to_owned)
    };
    assert_eq!(mode_after(json!({"id": 2, "result": {"sessionId": "s", "modes": {"currentModeId": "auto"}}})), None);
    assert_eq!(mode_after(json!({"id": 4, "method": "session/prompt", "params": {}})).as_deref(), Some("auto"));
    let option = json!({"sessionUpdate": "config_option_update", "configOptions": [{"id": "model", "currentValue": "x"}, {"id": "mode", "currentValue": "default"}]});
    assert_eq!(mode_after(update(option)).as_deref(), Some("default"));
    assert_eq!(mode_after(update(json!({"sessionUpdate": "current_mode_update", "currentModeId": "plan"}))).as_deref(), Some("plan"));
    assert_eq!(mode_after(update(json!({"sessionUpdate": "usage_update"}))).as_deref(), Some("plan"));
}

fn object() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        "[a-z/_]{0,12}".prop_map(Value::from),
        Just(json!("session/update"))
    ];
    let value = leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map(key(), inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    prop::collection::hash_map(key(), value, 0..6).prop_map(|map| Value::Object(map.into_iter().collect()))
}

const KNOWN: &[&str] =
    &["id", "method", "params", "update", "sessionUpdate", "result", "error", "message", "stopReason", "toolCallId", "type", "content"];

fn key() -> impl Strategy<Value = String> {
    prop_oneof![prop::sample::select(KNOWN).prop_map(str::to_owned), "[a-z]{0,4}"]
}

proptest! {
    #[test]
    fn any_object_is_one_event_and_nothing_of_it_is_lost(objects in prop::collection::vec(object(), 0..6)) {
        let (events, ..) = read(&objects);
        prop_assert_eq!(events.len(), objects.len());
        for (event, object) in events.iter().zip(&objects) {
            prop_assert!(event["type"].is_string() || object.get("type").is_some());
            for (key, value) in object.as_object().unwrap() {
                prop_assert_eq!(&event[key], value);
            }
        }
    }

    #[test]
    fn any_line_is_read_without_a_panic(line in "\\PC{0,60}") {
        let mut messages = Messages::default();
        messages.line(line.as_bytes());
        let is_object = serde_json::from_str::<Value>(&line).is_ok_and(|value| value.is_object());
        prop_assert_eq!(messages.into_messages().len(), usize::from(is_object));
    }
}
