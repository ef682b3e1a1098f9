//! The real clients, unmodified: the newest supabase-js, a realtime-js about 18 months older, and `realtime` from PyPI.
//! What a scenario does stands in tests/clients/scenarios.mjs and realtime-py.py, under the name of the test.

mod live;

/// Every client keeps every promise.
macro_rules! clients {
    ($promises:tt $($client:ident: $program:literal $script:literal;)*) => {
        $(mod $client {
            async fn play(scenario: &str) {
                crate::support::script::play($program, $script, scenario).await;
            }
            promises!($promises);
        })*
    };
}

macro_rules! promises {
    ({$($scenario:ident)*}) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $scenario() {
            play(stringify!($scenario)).await;
        })*
    };
}

clients! {
    {
        gets_rows_as_they_come_change_and_go
        gets_the_whole_old_row_where_replica_identity_is_full
        gets_by_each_binding_what_its_event_and_filter_say
        gets_rows_that_match_one_of_several_conditions
        shows_two_users_only_their_own_rows
        sees_other_rows_once_another_token_is_set
        is_let_in_by_a_token_that_comes_after_the_join
        keeps_the_rows_when_the_same_user_renews_the_token
        subscribes_with_an_opaque_key_alone
        gets_changes_again_after_its_socket_was_cut
        gets_changes_again_after_the_relay_was_restarted
        misses_nothing_while_the_relay_is_away_when_it_named_its_session
        has_channels_that_come_and_go_on_their_own
        is_told_why_a_subscription_fails
        stays_subscribed_when_it_is_told_that_no_policy_shows_it_a_row
        is_refused_with_an_expired_token_and_let_in_with_a_new_one
        is_closed_when_its_token_ends
        is_not_connected_with_a_wrong_signature
        sends_broadcasts_to_others_and_to_itself_and_is_told_that_they_were_sent
        sends_a_hundred_without_waiting_in_order
        is_told_that_a_broadcast_is_too_large_and_goes_on
        sends_by_http_without_joining
        gets_bytes_where_its_version_has_them
        hears_broadcasts_from_sql_with_their_ids
        uses_the_private_channels_that_the_policies_give_it
        knows_who_is_present_from_which_tabs
        is_gone_when_its_socket_was_cut_and_is_present_when_it_tracks_again
    }
    supabase_js: "node" "supabase-js.mjs";
    realtime_js_older: "node" "realtime-js-older.mjs";
    realtime_py: "target/python/bin/python" "realtime-py.py";
}

#[tokio::test(flavor = "multi_thread")]
async fn a_todo_app_has_one_address_for_logins_rows_and_changes() {
    let scenario = "a_todo_app_has_one_address_for_logins_rows_and_changes";
    crate::support::script::play("node", "one-url.mjs", scenario).await;
}
