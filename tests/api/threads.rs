//! What may go to another thread, or be shared by several.

use dmsnap::*;

fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}

macro_rules! all_go_anywhere {
    ($($of:ty),* $(,)?) => { $(goes_anywhere::<$of>();)* };
}

/// It compiles, or it does not. A control plane holds these across threads and await points.
#[test]
fn every_public_type_goes_to_other_threads_and_is_shared_by_them() {
    all_go_anywhere!(
        SnapshotOptions,
        Snapshot,
        Handles,
        Origin,
        Pool,
        PoolOptions,
        Error,
        ErrorKind,
        DeviceId,
        ChunkSize,
        CowSize,
        SectorSize,
        Store,
        Warning,
        Teardown,
        ReapOptions,
        base::DeviceName,
        base::DeviceUuid,
        base::DeviceNumber,
        base::LayerId,
        base::LoopHandle,
        base::OriginIdentity,
        base::Progress,
        base::FileId,
        base::Sectors,
        Durability,
        dm::SnapshotStatus,
        dm::TargetLine,
        dm::SnapshotParams,
        dm::Usage,
        error::Leftover,
        error::Step,
        error::Refusal,
        error::Retry,
        export::ExportOptions,
        export::Exported,
        export::FlattenOptions,
        export::Flattened,
        find::SnapshotInfo,
        find::LoopFacts,
        find::Standing,
        find::State,
        find::TreeNode,
        merge::MergeOptions,
        merge::MergeOutcome,
        pool::Claimed,
        pool::CowFate,
        pool::PoolStatus,
        pool::Released,
        pool::WhenEmpty,
        snapshot::CheckpointOptions,
        snapshot::GrowOptions,
        snapshot::Layer,
        snapshot::StackOptions,
        store::ExceptionStore<std::fs::File>,
        store::StackPlace,
        store::StoreError,
        store::StoreSummary,
        teardown::Fate,
        teardown::Outcome,
        teardown::Reaped,
        teardown::Repair,
        teardown::Repaired,
        WhenBusy,
        timings::Timings,
        watch::Change,
        watch::Watch,
        watch::WatchEvent,
    );
}
