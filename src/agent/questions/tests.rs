use super::*;

fn question(ask: Ask) -> Question {
    let options = [["always", "allow_always", ""], ["yes", "allow_once", ""], ["no", "reject_once", ""]].map(Choice::new).into();
    Question::new(json!(0), options, ask)
}

const ASK: Ask = Ask { timeout: Duration::from_secs(10), allow_always: false };

#[tokio::test(start_paused = true)]
async fn what_nobody_answers_is_refused_and_the_clock_stands_meanwhile() {
    let (questions, begun) = (Questions::default(), Instant::now());
    let deadline = begun + Duration::from_secs(5);
    questions.ask(question(ASK));
    assert_eq!(questions.deadline(deadline), None);
    let settled = questions.next().await;
    assert_eq!((settled.by, settled.answer.option_id.as_deref()), (By::Timeout, Some("no")));
    questions.time_up(deadline).await;
    assert_eq!(begun.elapsed().as_secs(), 15);
}

#[tokio::test]
async fn an_answer_is_taken_once_and_always_is_offered_only_where_it_was_asked_for() {
    let questions = Questions::default();
    let (first, second) = (question(ASK), question(Ask { allow_always: true, ..ASK }));
    let [first_id, second_id] = [&first, &second].map(|question| question.permission_id.clone());
    questions.ask(first);
    questions.ask(second);
    let answer =
        |id: &str, pick: &Pick| questions.answer(id, pick, Answer::default(), By::Client).map(|settled| settled.answer.option_id.unwrap());
    let always = Pick::Option("always".to_owned());
    assert_eq!(answer(&first_id, &always), Err(NotTaken::NotOffered));
    assert_eq!(answer(&second_id, &always), Ok("always".to_owned()));
    assert_eq!(answer(&first_id, &Pick::Allow), Ok("yes".to_owned()));
    assert_eq!(answer(&first_id, &Pick::Option("yes".to_owned())), Ok("yes".to_owned()));
    assert_eq!(answer(&first_id, &Pick::Deny), Err(NotTaken::AnsweredOtherwise));
    assert_eq!(answer("other", &Pick::Deny), Err(NotTaken::Unknown));
    // In the order of the answers.
    assert_eq!(questions.next().await.question.permission_id, second_id);
    assert_eq!(questions.next().await.question.permission_id, first_id);
    questions.ask(question(ASK));
    questions.withdraw(&json!(0));
    let settled = questions.next().await;
    assert_eq!((settled.by, settled.answer.option_id), (By::Cancel, None));
    assert_eq!(answer(&settled.question.permission_id, &Pick::Allow), Err(NotTaken::Over));
}
