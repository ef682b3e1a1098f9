//! A real browser with the browser build of supabase-js. The page and what happens to it: tests/clients/page.mjs.

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_rows_as_they_come_change_and_go() {
    crate::support::script::play("node", "page.mjs", "shows_rows_as_they_come_change_and_go").await;
}

/// The page examples/todo.html. What happens to it: tests/clients/todo.mjs.
async fn todo(scenario: &str) {
    crate::support::script::play("node", "todo.mjs", scenario).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_what_was_updated_and_deleted_while_the_relay_was_down() {
    todo("shows_what_was_updated_and_deleted_while_the_relay_was_down").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_its_copy_without_a_relay_after_a_reload_and_mends_it() {
    todo("shows_its_copy_without_a_relay_after_a_reload_and_mends_it").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goes_on_where_the_browser_lets_no_socket_through() {
    todo("goes_on_where_the_browser_lets_no_socket_through").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goes_on_where_the_browser_lets_no_stream_through_either() {
    todo("goes_on_where_the_browser_lets_no_stream_through_either").await;
}

/// The React hook of examples/client. What happens to it: tests/clients/strict-mode.mjs.
#[tokio::test(flavor = "multi_thread")]
async fn has_one_connection_under_strict_mode_and_none_after_the_component() {
    let scenario = "has_one_connection_under_strict_mode_and_none_after_the_component";
    crate::support::script::play("node", "strict-mode.mjs", scenario).await;
}

/// The inspector of the relay. What happens to it: tests/clients/inspector.mjs.
async fn inspector(scenario: &str) {
    crate::support::script::play("node", "inspector.mjs", scenario).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lets_in_the_service_role_alone_and_keeps_its_token_in_the_tab() {
    inspector("lets_in_the_service_role_alone_and_keeps_its_token_in_the_tab").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn says_why_a_row_is_delivered_or_not_by_key_change_user_and_token() {
    inspector("says_why_a_row_is_delivered_or_not_by_key_change_user_and_token").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_changes_as_they_come_and_what_a_user_gets_of_them() {
    inspector("shows_changes_as_they_come_and_what_a_user_gets_of_them").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_who_is_connected_to_what_and_how_tables_are_decided() {
    inspector("lists_who_is_connected_to_what_and_how_tables_are_decided").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fits_a_phone_by_day_and_by_night() {
    inspector("fits_a_phone_by_day_and_by_night").await;
}
