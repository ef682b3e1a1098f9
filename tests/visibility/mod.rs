//! Who is told what: policies, grants and claims, and their changes.

pub mod access_claims;
pub mod access_late;
pub mod access_locks;
pub mod access_order;
pub mod access_property;
pub mod access_settings;
pub mod grants;
pub mod overlaps;
pub mod policy;
pub mod policy_allowed;
pub mod policy_cost;
pub mod policy_functions;
pub mod policy_generated;
pub mod policy_hostile;
pub mod policy_leaks;
pub mod policy_live;
pub mod policy_patterns;
pub mod policy_patterns_claims;
pub mod policy_patterns_members;
pub mod policy_patterns_mixed;
pub mod policy_patterns_odd;
pub mod policy_patterns_rows;
pub mod policy_rewrites;
pub mod policy_shapes;
pub mod policy_ways;
pub mod policy_withdrawn;
