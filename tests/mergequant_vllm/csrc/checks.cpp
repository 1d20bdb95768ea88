// Runs every check in every instruction set that this CPU has; exit status 1 if one fails.
//
// For machines and builds on which PyTorch does not run: an emulated ARM CPU, sanitizers.

#include "linear_checks.h"
#include "row_checks.h"

int main()
{
    Tally tally;
    for (int isa = 0; isa < mq_isa_count(); ++isa) {
        if (!mq_isa_runs(isa)) {
            printf("%s does not run here\n", mq_isa_name(isa));
            continue;
        }
        const long before = tally.cases;
        check_linears(isa, tally);
        check_rows(isa, tally);
        printf("%s ran %ld cases\n", mq_isa_name(isa), tally.cases - before);
    }
    printf("%ld of %ld cases failed\n", tally.failed, tally.cases);
    return tally.failed != 0;
}
