//! The client of examples/client under faults: what it holds equals the tables. What happens stands in tests/clients/live.mjs, under
//! the name of the test.

async fn play(scenario: &str) {
    crate::support::script::play("node", "live.mjs", scenario).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equals_its_tables_in_the_end_whatever_failed() {
    play("equals_its_tables_in_the_end_whatever_failed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn takes_the_next_way_when_one_is_blocked_and_loses_nothing_between_them() {
    play("takes_the_next_way_when_one_is_blocked_and_loses_nothing_between_them").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applies_each_transaction_as_a_whole() {
    play("applies_each_transaction_as_a_whole").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_every_digit_and_finds_rows_by_their_key() {
    play("keeps_every_digit_and_finds_rows_by_their_key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn knows_its_own_write_and_reads_again_when_asked() {
    play("knows_its_own_write_and_reads_again_when_asked").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn never_shows_the_rows_of_another_user() {
    play("never_shows_the_rows_of_another_user").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn says_why_there_are_no_rows_and_goes_on_once_there_is_a_reason_to() {
    play("says_why_there_are_no_rows_and_goes_on_once_there_is_a_reason_to").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gives_its_rows_to_vue_and_tanstack() {
    play("gives_its_rows_to_vue_and_tanstack").await;
}
