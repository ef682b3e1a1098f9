//! A real browser with the browser build of supabase-js. The page and what happens to it: tests/clients/page.mjs.

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_rows_as_they_come_change_and_go() {
    crate::support::script::play("node", "page.mjs", "shows_rows_as_they_come_change_and_go").await;
}
