{
use std::ops::ControlFlow;

use dmsnap::export::ExportOptions;
use dmsnap::merge::MergeOptions;

ExportOptions::new().export("/images/base.ext4", "/var/lib/vms/vm-42.cow", "/images/vm-42.ext4")?;
let outcome =
    MergeOptions::new().merge("/images/base.ext4", "/var/lib/vms/vm-42.cow", |_| ControlFlow::Continue(()))?;
println!("{outcome:?}"); // Stopped, if the callback breaks off: merge again
Ok::<(), dmsnap::Error>(())
}
